"""The unpacking kernel, interpreted on the CPU: the bits of the plain-jnp unpacking; and compiled for three GPUs."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import triton_call, tuning
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, fused, grouped_launch, nf4_matmul, quantize_nf4
from pallas_kernels.nf4 import matvec as matvec_module
from pallas_kernels.nf4 import pack as pack_module
from pallas_kernels.nf4 import unpack as unpack_module
from pallas_kernels.nf4.codebook import NF4_LEVELS, nf4_boundaries

MODULES = (
    "nf4.triton_kernels",
    "nf4.matvec_kernels",
    "nf4.matmul_kernels",
    "nf4.grouped_kernels",
    "low_rank.beside_kernels",
)
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_torch(x: jax.Array) -> torch.Tensor:
    array = np.array(x)
    return (
        torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        if array.dtype == jnp.bfloat16
        else torch.from_numpy(array)
    )


def interpreted_call(kernel, *arrays, out, grid, num_warps, num_stages=3, aliases=None, **constants):
    """triton_call's stand-in: Triton's interpreter over torch tensors."""
    tensors = [to_torch(array) for array in arrays]
    if "PTX" in constants:  # that is for the GPU
        constants["PTX"] = False
    if "W" in constants:
        constants["W"] = dataclasses.replace(constants["W"], ptx=False)
    shapes = out if isinstance(out, list) else [out]
    results = [tensors[next(iter(aliases))]] if aliases else [poisoned(shape) for shape in shapes]
    kernel[grid](*tensors, *results, **constants)
    arrays = [
        jnp.asarray((t.float() if t.is_floating_point() else t).numpy()).astype(shape.dtype)
        for t, shape in zip(results, shapes, strict=True)
    ]
    return arrays if isinstance(out, list) else arrays[0]


def poisoned(shape: jax.ShapeDtypeStruct) -> torch.Tensor:
    if shape.dtype == jnp.uint8:
        return torch.full(shape.shape, 171, dtype=torch.uint8)
    return torch.full(shape.shape, float("nan"), dtype=TORCH[jnp.dtype(shape.dtype).name])


def stacked(shape: tuple[int, ...], seed: int = 0, double_quant: bool = True) -> NF4Array:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    packed = [quantize_nf4(jnp.asarray(matrix), double_quant=double_quant) for matrix in w]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 64), (2, 5, 192), (2, 9, 4096), (1, 4, 320)])
def test_same_bits(shape: tuple, double_quant: bool, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "triton_call", interpreted_call)
    q = stacked(shape, double_quant=double_quant)
    every = unpack_module.unpack([q], jnp.arange(shape[0], dtype=jnp.int32), dtype)
    np.testing.assert_array_equal(np.asarray(every), np.asarray(dequantize_nf4(q, dtype)))


def test_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "triton_call", interpreted_call)
    qs = [stacked((3, height, 128), seed=height) for height in (8, 2, 3)]
    got = unpack_module.unpack(qs, jnp.array([2], jnp.int32), jnp.float32, rows=2, columns=5)
    assert got.shape == (1, 15, 133)
    expected = np.concatenate([np.asarray(dequantize_nf4(q, jnp.float32))[2] for q in qs])
    np.testing.assert_array_equal(np.asarray(got)[0, :13, :128], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 192)])
def test_packs_to_the_same_bits(shape: tuple[int, ...], dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "triton_call", interpreted_call)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    magnitudes = {
        jnp.float32: (1.0, 1e-37, 1e-39, 1e-44, 5e37, 0.0),
        jnp.float16: (1.0, 1e-6),
        jnp.bfloat16: (1.0, 1e-36),
    }
    for magnitude in magnitudes[dtype]:  # of bfloat16, the interpreter gets denormals wrong
        w = jnp.asarray((values * np.float32(magnitude)).astype(dtype))
        codes, scale_bits = pack_module.pack_blocks(w)
        expected = quantize_nf4(w, double_quant=False, implementation="xla")
        np.testing.assert_array_equal(np.asarray(codes), np.asarray(expected.codes))
        np.testing.assert_array_equal(np.asarray(scale_bits), np.asarray(expected.scales).view(np.uint32))


def test_codes_beside_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a boundary, the float below and the float above, and at levels."""
    monkeypatch.setattr(pack_module, "triton_call", interpreted_call)
    edges = nf4_boundaries()
    values = np.concatenate([edges, np.nextafter(edges, -1), np.nextafter(edges, 1), NF4_LEVELS, [1, 1, 1]])
    w = jnp.asarray(values.astype(np.float32).reshape(1, 64))
    codes, _ = pack_module.pack_blocks(w)
    np.testing.assert_array_equal(codes, quantize_nf4(w, double_quant=False, implementation="xla").codes)


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_any_shape_there_and_back(
    monkeypatch: pytest.MonkeyPatch, depth: int, rows: int, blocks: int, double_quant: bool, seed: int
) -> None:
    """Packed and unpacked by the kernels as in plain jnp, whatever the shape."""
    monkeypatch.setattr(pack_module, "triton_call", interpreted_call)
    monkeypatch.setattr(unpack_module, "triton_call", interpreted_call)
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((depth, rows, 64 * blocks), np.float32))
    codes, _ = pack_module.pack_blocks(w)
    q = quantize_nf4(w, double_quant=double_quant)
    np.testing.assert_array_equal(codes, q.codes)
    order = jnp.arange(depth, dtype=jnp.int32)[::-1]
    got = unpack_module.unpack([q], order, jnp.float32)
    np.testing.assert_array_equal(got, dequantize_nf4(q, jnp.float32, implementation="xla")[::-1])


@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.float16), (1, jnp.float32), (2, jnp.float32), (3, jnp.float16)])
@pytest.mark.parametrize(("shape", "double_quant"), [((2, 5, 192), True), ((1, 33, 1152), True), ((2, 5, 192), False)])
def test_matvec(rows: int, dtype: jnp.dtype, shape: tuple, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matvec_module, grouped_launch):
        monkeypatch.setattr(module, "triton_call", interpreted_call)
    q = stacked(shape, double_quant=double_quant)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, shape[-1]), np.float32).astype(dtype))
    last = shape[0] - 1
    y = np.asarray(matvec_module.launch(x, q, jnp.int32(last)), np.float64)
    w = np.asarray(dequantize_nf4(q, jnp.float32, implementation="xla"), np.float64)[last]
    expected = np.asarray(x, np.float64) @ w.T
    bound = 1e-5 if dtype == jnp.float32 else 2e-3
    assert np.linalg.norm(y - expected) <= bound * np.linalg.norm(expected)


TILES = {  # whole tiles and none, parts of a sum that end early, several blocks a step
    "one program": fused.Tiles(16, 64, 2, 4),
    "parts": fused.Tiles(16, 32, 1, 4, splits=3),
    "blocks": fused.Tiles(32, 16, 4, 4, splits=2),
}


@pytest.mark.parametrize(
    ("tiles", "room", "tokens", "shape", "double_quant"),
    [
        ("one program", 64, 5, (33, 192), True),
        ("parts", 0, 40, (64, 320), False),
        ("blocks", 128, 40, (33, 192), True),
    ],
)
def test_matmul(tiles: str, room: int, tokens: int, shape: tuple, double_quant: bool, monkeypatch) -> None:
    """Both passes, with room for a low-rank product beside the weight's and without."""
    monkeypatch.setattr(fused, "triton_call", interpreted_call)
    (out, width), rng = shape, np.random.default_rng(0)
    stack = stacked((2, *shape), double_quant=double_quant)
    q = NF4Slice(stack, jnp.int32(1)) if room else jax.tree.map(lambda leaf: leaf[1], stack)
    sizes = {"x": (tokens, width + room), "g": (tokens, out + room), "right": (out, room), "below": (room, width)}
    x, g, right, below = (jnp.asarray(rng.standard_normal(size).astype(np.float16)) for size in sizes.values())
    w = np.asarray(dequantize_nf4(stack, jnp.float32, implementation="xla"), np.float64)[1]
    beside = (right, below) if room else (None, None)
    y = fused.product(x, q, beside[0], tiles=TILES[tiles])
    dx = fused.input_gradient(g, q, beside[1], tiles=TILES[tiles])
    expected = np.asarray(x, np.float64) @ np.concatenate([w, np.asarray(right, np.float64)], axis=1).T
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= 2e-3 * np.linalg.norm(expected)
    expected = np.asarray(g, np.float64) @ np.concatenate([w, np.asarray(below, np.float64)], axis=0)
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) <= 2e-3 * np.linalg.norm(expected)


def test_matmul_goes_the_way_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass each, where the table knows the shape; unpacking where it does not, or where the kernels cannot."""
    monkeypatch.setattr(fused, "triton_call", interpreted_call)
    monkeypatch.setattr(fused, "triton_obstacle", lambda: None)
    monkeypatch.setattr(tuning, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(tuning, "device_kind", lambda: "Invented")
    shape = frozenset({"tokens": 16, "out": 33, "width": 128}.items())
    table = {("nf4_matmul.forward", shape): {"implementation": "triton"}}
    monkeypatch.setattr(tuning, "_table", lambda kind: table)
    taken = []
    for name in ("product", "input_gradient"):
        own = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, own=own, name=name: taken.append(name) or own(*a))
    q = jax.tree.map(lambda leaf: leaf[0], stacked((1, 33, 128)))
    for tokens, dtype in ((9, jnp.float16), (17, jnp.float16), (9, jnp.float32)):
        x = jnp.ones((tokens, 128), dtype)
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, q), x)
        pullback(y)
        assert taken == ["product"] * (tokens == 9 and dtype == jnp.float16), (tokens, dtype)
        taken.clear()
    x = jnp.ones((2, 3, 128), jnp.float16)
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, q, implementation="triton"), x)
    (dx,) = pullback(y)
    assert taken == ["product", "input_gradient"]
    assert (y.shape, dx.shape) == ((2, 3, 33), x.shape)
    table["nf4_matmul.forward", shape] = {"implementation": "cublas"}
    with pytest.raises(ValueError, match=r"invented.json: nf4_matmul.forward .*must be mosaic, triton or xla"):
        nf4_matmul(jnp.ones((9, 128), jnp.float16), q)


def test_matmul_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels cannot do is said, and by whom it can be done."""
    q = jax.tree.map(lambda leaf: leaf[0], stacked((1, 33, 128)))
    x = jnp.ones((3, 128), jnp.bfloat16)
    for capability, reason in ((None, "jax runs on another device"), ((7, 5), "8.0 or later")):
        monkeypatch.setattr(triton_call, "cuda_capability", lambda capability=capability: capability)
        with pytest.raises(ValueError, match=f"needs an NVIDIA GPU.*{reason}.*use xla"):
            nf4_matmul(x, q, implementation="triton")
    monkeypatch.setattr(fused, "triton_obstacle", lambda: None)
    with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
        nf4_matmul(x.astype(jnp.float32), q, implementation="triton")
    with pytest.raises(ValueError, match="multiple of 64"):
        nf4_matmul(jnp.ones((3, 34), jnp.bfloat16), quantize_nf4(jnp.ones((4, 34))), implementation="triton")
    with pytest.raises(ValueError, match="room for 64 columns"):
        fused.product(jnp.ones((3, 192), jnp.bfloat16), q)


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", 24), ("rows", 512), ("warps", 16), ("splits", 0), ("stages", 9)]
)
def test_tiles_check_themselves(field: str, value: int) -> None:
    fine = {"tokens": 16, "rows": 64, "blocks": 2, "warps": 4}
    with pytest.raises(ValueError, match=field):
        fused.Tiles(**fine | {field: value})


def test_it_compiles_for_every_supported_gpu() -> None:
    tool = Path(__file__).with_name("compile_triton.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(tool), *(f"pallas_kernels.{name}" for name in MODULES)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
