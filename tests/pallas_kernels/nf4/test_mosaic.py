"""The kernel for Hopper that decodes in registers: interpreted against float64, lowered for CUDA, and who may choose it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.nf4 import (
    NF4Slice,
    dequantize_nf4,
    linears,
    mosaic,
    nf4_matmul,
    product,
    quantize_nf4,
    ready,
    room_beside,
)
from pallas_kernels.nf4.dequantize import block_scales


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def stacks(heights: Sequence[int], width: int, double_quant: bool = True) -> list[NF4Slice]:
    """The second of two matrices each."""
    index = jnp.int32(1)
    return [
        NF4Slice(quantize_nf4(jnp.asarray(normal(height + i, 2, height, width)), double_quant=double_quant), index)
        for i, height in enumerate(heights)
    ]


def dense(slices: Sequence[NF4Slice]) -> np.ndarray:
    return np.concatenate([np.asarray(dequantize_nf4(one.cut(), jnp.float32), np.float64) for one in slices])


@pytest.mark.parametrize(
    ("heights", "width", "room", "tokens", "dtype", "tiles"),
    [
        ((256, 128), 192, 0, 37, jnp.bfloat16, mosaic.Tiles(16, stages=2)),
        ((128,), 256, 64, 8, jnp.float16, mosaic.Tiles(16, blocks=2, splits=2, stages=3)),
    ],
)
def test_against_float64(heights, width, room, tokens, dtype, tiles):
    """In the second case with scales and what is beside of all layers, made before."""
    slices = stacks(heights, width, double_quant=room > 0)
    x = jnp.asarray(normal(1, tokens, width + room), dtype)
    beside = jnp.asarray(normal(2, sum(heights), room), dtype) if room else None
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        scales = [mosaic.scale_columns(one.stack) for one in slices] if room else None
        of_all = beside if beside is None else jnp.stack([beside + 1, beside])
        y = mosaic.product(x, slices, of_all, scales=scales, tiles=tiles, programs=2, interpreted=True)
    whole = dense(slices) if beside is None else np.concatenate([dense(slices), np.asarray(beside, np.float64)], axis=1)
    expected = np.asarray(x, np.float64) @ whole.T
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert y.dtype == dtype
    assert error < (1e-3 if dtype == jnp.float16 else 4e-3)


def test_weights_are_those_of_unpacking_to_the_bit():
    """Rows of an identity matrix pick them out."""
    slices, x = stacks((128,), 64), jnp.eye(64, dtype=jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        y = mosaic.product(x, slices, tiles=mosaic.Tiles(64), programs=1, interpreted=True)
    unpacked = dequantize_nf4(slices[0].cut(), jnp.bfloat16).T
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(unpacked, np.float32))


@pytest.mark.parametrize("tokens", [64, 128, 2048])
def test_lowers_for_hopper(tokens):
    """Within shared memory, with LoRA beside."""
    slices = [
        NF4Slice(jax.eval_shape(quantize_nf4, jax.ShapeDtypeStruct((2, 256, 4096), jnp.float32)), jnp.int32(1))
    ] * 2
    x, beside = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, 4160), (2, 512, 64)))
    scales = [jax.ShapeDtypeStruct((2, 64, 256), jnp.float32)] * 2
    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *a: mosaic.product(*a[:3], scales=a[3])).trace(x, slices, beside, scales)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 1


def test_every_item_once():
    kernel = mosaic._Product(
        5000, (256, 128), 256, 320, jnp.dtype(jnp.bfloat16), 4, mosaic.Tiles(256, splits=2), interpreted=True
    )
    items = [tuple(int(each) for each in kernel.item(jnp.int32(i))) for i in range(kernel.items)]
    assert len({item[:3] for item in items}) == kernel.items == 20 * 3 * 2
    ranges = [range(lo, hi) for token, row, _, lo, _, hi in items if token == row == 0]
    assert sorted(step for part in ranges for step in part) == list(range(5))


@pytest.mark.parametrize("residual", [True, False])
def test_linears_hand_it_low_rank_blocks(residual, monkeypatch):
    slices, rows, rank = stacks((256, 128), 64), 20, 16
    x, z, b = (jnp.asarray(normal(i, *shape)) for i, shape in enumerate([(rows, 64), (rows, 2 * rank), (2, 384, rank)]))
    added = jnp.asarray(normal(9, rows, 384)) if residual else None
    monkeypatch.setattr(mosaic, "obstacle", lambda *_: None)

    def replaced(x, slices, beside, scales=None):
        if scales is not None:
            np.testing.assert_array_equal(scales[1][1], block_scales(slices[1].cut()).T)
            beside = beside[1]
        return product(x, slices, beside, way="xla")

    monkeypatch.setattr(mosaic, "product", replaced)
    given = {"z": z, "b": b, "layer": 1, "residual": added}
    ours, expected = (linears(x, slices, **given, implementation=name) for name in ("mosaic", "separate"))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    together = jnp.pad(jnp.concatenate([x, z], axis=1), ((0, 0), (0, room_beside(x, slices, 2 * rank) - 2 * rank)))
    assert together.shape == (rows, 64 + 64)
    made = ready(slices, b, x)
    assert made is not None
    assert ready(slices, b, x[:16]) is None
    for name in ("mosaic", "separate"):
        ours = linears(together, slices, **given | {"z": None, "made": made}, implementation=name)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "dtype", "named"),
    [(128, jnp.float32, "bfloat16 or float16"), (192, jnp.bfloat16, "multiple of 128"), (128, jnp.bfloat16, "Hopper")],
)
def test_says_what_it_takes(height, dtype, named):
    (one,) = stacks((height,), 64)
    with pytest.raises(ValueError, match=named):
        nf4_matmul(jnp.ones((16, 64), dtype), one.cut(), implementation="mosaic")


def test_steps_divide_the_width():
    slices, x = stacks((128,), 192), jnp.ones((16, 192), jnp.bfloat16)
    assert mosaic.default_tiles(16, 128, 192, 132).blocks == 1
    with pytest.raises(ValueError, match="192 columns"):
        mosaic.product(x, slices, tiles=mosaic.Tiles(16, blocks=2))


@pytest.mark.parametrize("fields", [{"tokens": 48}, {"tokens": 64, "blocks": 4}, {"tokens": 64, "stages": 1}])
def test_tiles_check_themselves(fields):
    with pytest.raises(ValueError, match=r"tokens must be|at least 2 stages"):
        mosaic.Tiles(**fields)
