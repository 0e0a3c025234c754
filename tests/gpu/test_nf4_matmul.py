"""Products with packed weights on the GPU, decoded in registers: both passes against float64, and the same bits every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4 import (
    NF4Array,
    NF4Slice,
    dequantize_nf4,
    fused,
    linears,
    mosaic,
    nf4_matmul,
    quantize_nf4,
    ready,
)

pytestmark = pytest.mark.gpu
BOUNDS = {jnp.bfloat16: 1e-2, jnp.float16: 2e-3}
SHAPES = {"deep": (384, 1088), "odd": (33, 192), "square": (512, 512), "wide": (200, 1152), "high": (4100, 256)}


def normal(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def packed(shape: tuple[int, int], double_quant: bool = True) -> NF4Array:
    return quantize_nf4(normal(0, (2, *shape), jnp.float32), double_quant=double_quant)


def assert_close(actual: jax.Array, left: jax.Array, right: np.ndarray) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(left, np.float64) @ right
    assert np.linalg.norm(actual - expected) <= BOUNDS[left.dtype.type] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 17, 100, 300, 1024])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
def test_both_passes(name: str, tokens: int, dtype: jnp.dtype, implementation: str):
    if implementation == "mosaic" and SHAPES[name][0] % mosaic.TILE:
        pytest.skip(f"mosaic takes multiples of {mosaic.TILE} rows")
    q = jax.tree.map(lambda leaf: leaf[1], packed(SHAPES[name], double_quant=name != "wide"))
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)
    x, g = normal(1, (tokens, w.shape[1]), dtype), normal(2, (tokens, w.shape[0]), dtype)
    run = jax.jit(lambda x, g: jax.vjp(lambda x: nf4_matmul(x, q, implementation=implementation), x)[1](g))
    assert_close(jax.jit(lambda x: nf4_matmul(x, q, implementation=implementation))(x), x, w.T)
    assert_close(run(x, g)[0], g, w)


@pytest.mark.parametrize(
    "tiles",
    [
        fused.Tiles(16, 64, 2, 4),
        fused.Tiles(64, 128, 1, 4),
        fused.Tiles(64, 32, 4, 8, splits=3),
        fused.Tiles(128, 64, 2, 8, stages=2, splits=2),
    ],
)
@pytest.mark.parametrize("room", [0, 64, 128])
def test_tiles_and_room(tiles: fused.Tiles, room: int):
    dtype, tokens, (out, width) = jnp.bfloat16, 130, SHAPES["wide"]
    q = packed((out, width))
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)[1]
    x, g = normal(1, (tokens, width + room), dtype), normal(2, (tokens, out + room), dtype)
    beside, below = (normal(3, (out, room), dtype), normal(4, (room, width), dtype)) if room else (None, None)
    whole = w if beside is None else np.concatenate([w, np.asarray(beside, np.float64)], axis=1)
    forward = jax.jit(lambda x, i: fused.product(x, NF4Slice(q, i), beside, tiles=tiles))
    assert_close(forward(x, jnp.int32(1)), x, whole.T)
    whole = w if below is None else np.concatenate([w, np.asarray(below, np.float64)], axis=0)
    backward = jax.jit(lambda g, i: fused.input_gradient(g, NF4Slice(q, i), below, tiles=tiles))
    assert_close(backward(g, jnp.int32(1)), g, whole)
    for run, operand in ((forward, x), (backward, g)):
        first, second = run(operand, jnp.int32(0)), run(operand, jnp.int32(0))
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


@pytest.mark.parametrize("tokens", [5, 64, 200, 700])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_tiles_of_mosaic(tokens: int, blocks: int, splits: int):
    """Float32 sums of products with the weights of unpacking, which are added in another order."""
    heights, width, room, dtype = (256, 128), 1152, 64, jnp.bfloat16
    slices = [NF4Slice(packed((height, width)), jnp.int32(1)) for height in heights]
    w = np.concatenate([np.asarray(dequantize_nf4(one.cut(), dtype), np.float64) for one in slices])
    x, beside = normal(1, (tokens, width + room), dtype), normal(2, (sum(heights), room), dtype)
    tiles = mosaic.Tiles(64 if blocks == 2 else 256, blocks=blocks, splits=splits)
    run = jax.jit(lambda x, slices: mosaic.product(x, slices, beside, tiles=tiles))
    y, again = run(x, slices), run(x, slices)
    expected = np.asarray(x, np.float64) @ np.concatenate([w, np.asarray(beside, np.float64)], axis=1).T
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= 2e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(again, np.float32))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_mosaic_has_the_weights_of_unpacking_to_the_bit(dtype: jnp.dtype):
    """Rows of an identity matrix pick them out."""
    one = NF4Slice(packed((256, 512)), jnp.int32(1))
    y = jax.jit(lambda x: mosaic.product(x, [one]))(jnp.eye(512, dtype=dtype))
    unpacked = dequantize_nf4(one.cut(), dtype).T
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(unpacked, np.float32))


@pytest.mark.parametrize("rows", [8, 17, 64])
def test_linears_by_mosaic(rows: int):
    slices, rank, dtype = [NF4Slice(packed((height, 512)), jnp.int32(1)) for height in (256, 128)], 16, jnp.bfloat16
    x, z, b = normal(1, (rows, 512), dtype), normal(2, (rows, 2 * rank), dtype), normal(3, (2, 384, rank), dtype)
    residual = normal(4, (rows, 384), dtype)
    given = {"z": z, "b": b, "layer": jnp.int32(1), "residual": residual}
    ours, expected = (
        jax.jit(lambda x, name=name: linears(x, slices, **given, implementation=name))(x)
        for name in ("mosaic", "separate")
    )
    error = np.asarray(ours, np.float64) - np.asarray(expected, np.float64)
    assert np.linalg.norm(error) <= BOUNDS[dtype] * np.linalg.norm(np.asarray(expected, np.float64))
    together = jnp.pad(jnp.concatenate([x, z], axis=1), ((0, 0), (0, 64 - 2 * rank)))
    for made in (None, ready(slices, b, x)):
        again = {"z": None, "made": made}
        alike = jax.jit(lambda x, again=again: linears(x, slices, **given | again, implementation="mosaic"))(together)
        np.testing.assert_array_equal(np.asarray(alike, np.float32), np.asarray(ours, np.float32))


@pytest.mark.parametrize("implementation", ["mosaic", "triton", "xla", None])
@pytest.mark.parametrize(("name", "tokens"), [("deep", 77), ("odd", 5), ("wide", 130), ("high", 300)])
def test_with_lora(name: str, tokens: int, implementation: str | None):
    if implementation == "mosaic" and SHAPES[name][0] % mosaic.TILE:
        pytest.skip(f"mosaic takes multiples of {mosaic.TILE} rows")
    dtype, rank, scale = jnp.bfloat16, 16, 0.5
    q = jax.tree.map(lambda leaf: leaf[0], packed(SHAPES[name]))
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)
    x, g = normal(1, (tokens, w.shape[1]), dtype), normal(2, (tokens, w.shape[0]), dtype)
    a, b = normal(3, (w.shape[1], rank), jnp.float32), normal(4, (rank, w.shape[0]), jnp.float32)

    def run(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return nf4_matmul(x, q, a=a, b=b, scale=scale, implementation=implementation)

    @jax.jit
    def both(x, a, b, g):
        y, pullback = jax.vjp(run, x, a, b)
        return y, *pullback(g)

    wide = [np.asarray(each, np.float64) for each in (x, g, a, b)]
    z, dz = scale * wide[0] @ wide[2], scale * wide[1] @ wide[3].T
    right = wide[0] @ w.T + z @ wide[3], wide[1] @ w + dz @ wide[2].T, wide[0].T @ dz, z.T @ wide[1]
    for ours, expected in zip(both(x, a, b, g), right, strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)
