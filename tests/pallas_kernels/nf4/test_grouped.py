"""Several linears in one launch: the kernel, interpreted, and the separate products against float64; what goes with them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.low_rank import beside
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, grouped, grouped_launch, linears, quantize_nf4
from pallas_kernels.nf4.grouped_launch import launch

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
F16 = jnp.float16


def draw(*shape: int, seed: int = 0, dtype=F16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def stacked(height: int, width: int, double_quant: bool = True) -> NF4Array:
    """Random codes and scales."""
    rng = np.random.default_rng(height)
    shape = jax.ShapeDtypeStruct((2, height, width), jnp.float32)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8))
        return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)

    return jax.tree.map(fill, jax.eval_shape(lambda w: quantize_nf4(w, double_quant=double_quant), shape))


def interpreted_call(kernel, *arrays, out, grid, num_warps, num_stages=3, **constants):
    if "PTX" in constants:  # that is for the GPU
        constants["PTX"] = False
    if "W" in constants:
        constants["W"] = dataclasses.replace(constants["W"], ptx=False)
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    shapes = list(out) if isinstance(out, tuple) else [out]
    results = [torch.from_numpy(np.full(each.shape, np.nan, each.dtype)) for each in shapes]
    kernel[grid](*tensors, *results, **constants)
    returned = tuple(jnp.asarray(each.numpy()) for each in results)
    return returned if isinstance(out, tuple) else returned[0]


@pytest.fixture(autouse=True)
def on_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (grouped_launch, beside):
        monkeypatch.setattr(each, "triton_call", interpreted_call)
    for each in (grouped, beside):
        monkeypatch.setattr(each, "triton_obstacle", lambda: None)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def close(got: jax.Array, expected: np.ndarray, bound: float = 2e-3) -> None:
    assert got.shape == expected.shape
    assert np.linalg.norm(wide(got) - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("rows", "heights", "width", "rank", "residual", "double_quant"),
    [
        (1, (17, 2), 128, 16, False, True),  # tiles that are not all full, in turns of two programs
        (3, (3, 2, 5), 64 * 9, 32, True, True),  # three weights, more blocks than warps
        (9, (16,), 64 * 4, 0, True, False),
        (1, (64, 64), 64 * 5, 16, False, True),  # four tiles a turn
        (10, (64, 64), 128, 16, True, True),  # two, of two groups of rows, each program two turns
    ],
)
def test_the_kernel(rows, heights, width, rank, residual, double_quant) -> None:
    stacks = [stacked(height, width, double_quant) for height in heights]
    x, added = draw(rows, width, seed=1), draw(rows, sum(heights), seed=2) if residual else None
    z = draw(rows, len(heights) * rank, seed=3) if rank else None
    b = draw(2, sum(heights), rank, seed=4) if rank else None
    got = launch(x, stacks, jnp.int32(1), z, b, added, programs=2)
    parts = [wide(x) @ wide(dequantize_nf4(stack, jnp.float32)[1]).T for stack in stacks]
    expected = np.concatenate(parts, axis=1) + (0 if added is None else wide(added))
    if z is not None and b is not None:
        ends = np.cumsum(heights)
        low = [
            wide(z)[:, i * rank : (i + 1) * rank] @ wide(b)[1, end - height : end].T
            for i, (height, end) in enumerate(zip(heights, ends, strict=True))
        ]
        expected += np.concatenate(low, axis=1)
    close(got, expected)
    slices = [NF4Slice(stack, jnp.int32(1)) for stack in stacks]
    options = {"z": z, "b": b, "layer": jnp.int32(1), "residual": added}
    close(linears(x, slices, **options, implementation="separate"), expected)
    plain = [dequantize_nf4(stack, jnp.float32)[1] for stack in stacks]
    close(linears(x, plain, **options), expected)


def test_more_rows_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "ROWS", 2)
    stack, layer = stacked(16, 128), jnp.int32(0)
    x, residual, z, b = draw(3, 128, seed=1), draw(3, 16, seed=2), draw(3, 16, seed=3), draw(2, 16, 16, seed=4)
    got, expected = (
        linears(x, [NF4Slice(stack, layer)], z=z, b=b, layer=layer, residual=residual, implementation=name)
        for name in ("triton", "separate")
    )
    close(got, wide(expected))


def in_summands(function, x, a, layer, **options):
    """With z added up of two."""
    u, z = function(x, a, layer, parts=2, **options)
    return u, None if z is None else z.reshape(len(z), 2, -1).sum(axis=1)


@pytest.mark.parametrize("count", [0, 3, 20])
def test_inputs_with_their_low_rank_products(count: int) -> None:
    """Kernels against the same functions on XLA, which are the ops of training."""
    layer = jnp.int32(1)
    a = draw(2, count, 100, seed=1) if count else None
    x, weight, gate_up = draw(3, 100), draw(2, 100, seed=2, dtype=jnp.float32), draw(3, 200, seed=3)
    for function, inputs in (
        (beside.norm_and_project, (x, weight, 1e-5, a, layer)),
        (partial(in_summands, beside.swiglu_and_project), (gate_up, a, layer)),
        (partial(in_summands, beside.project), (x, a, layer)),
    ):
        (got, got_z), (expected, z) = (function(*inputs, implementation=name) for name in ("triton", "xla"))
        close(got, wide(expected))
        if z is None:
            assert got_z is None
        else:
            close(got_z, wide(z))


@pytest.mark.parametrize(("count", "room"), [(3, 0), (20, 64)])
def test_inputs_of_more_rows_with_their_low_rank_products(count: int, room: int, monkeypatch) -> None:
    """By programs that make several numbers of z for several rows; with room z is there, in summands."""
    monkeypatch.setattr(beside, "ROWS", 2)
    width, layer, rows = 2100, jnp.int32(1), 6
    a, x = draw(2, count, width, seed=1), draw(rows, width)
    weight, gate_up = draw(2, width, seed=2, dtype=jnp.float32), draw(rows, 2 * width, seed=3)
    for function, inputs in (
        (beside.norm_and_project, (x, weight, 1e-5, a, layer)),
        (beside.swiglu_and_project if room else partial(in_summands, beside.swiglu_and_project), (gate_up, a, layer)),
        (beside.project if room else partial(in_summands, beside.project), (x, a, layer)),
    ):
        results = [function(*inputs, room=room, implementation=name) for name in ("triton", "xla")]
        if room:
            assert all(z is None and u.shape == (rows, width + room) for u, z in results)
            parts = beside.summands(room, count)
            assert not any(u[:, width + parts * count :].any() for u, _ in results)
            sums = (u[:, width : width + parts * count].reshape(rows, parts, count).sum(axis=1) for u, _ in results)
            results = [(u[:, :width], z) for (u, _), z in zip(results, sums, strict=True)]
        (got, got_z), (expected, z) = results
        close(got, wide(expected))
        close(got_z, wide(z))


@pytest.mark.parametrize(
    ("width", "rows", "cell", "fits"),
    [(4096, 8, None, True), (8192, 1, 128, True), (4096, 9, None, False), (14336, 1, None, False), (4096, 1, 2, False)],
)
def test_what_comes_in_bulk(width: int, rows: int, cell: int | None, fits: bool) -> None:
    """What copies of multiples of 16 bytes bring to warps in even shares."""
    assert grouped_launch.fits_a_ring(width // 64, rows, cell) == fits


def test_what_the_kernel_refuses() -> None:
    x, one, other = draw(1, 128), NF4Slice(stacked(8, 128), 0), NF4Slice(stacked(8, 128, double_quant=False), 0)
    for inputs, weights, words in (
        (draw(65, 128), [one], "1 to 64 rows"),
        (x.astype(jnp.float32), [one], "not float32"),
        (x, [one, other], "packed alike"),
        (x, [one] * 4, "up to 3"),
        (x, [draw(8, 128)], "packed weights"),
    ):
        with pytest.raises(ValueError, match=words):
            linears(inputs, weights, implementation="triton")
    with pytest.raises(ValueError, match="z and b together"):
        linears(x, [one], z=draw(1, 16))
