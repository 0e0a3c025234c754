"""Unpacking, against plain numpy: dtypes, layouts, magnitudes, shards, stacks, and what a compiler may not change."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.nf4 import NF4Array, dequantize, dequantize_nf4, nf4_partition_specs, quantize_nf4

Reference = Callable[..., np.ndarray]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# Blocks of a matrix whose scales, or products of them, are ordinary, float16 denormals, float32 denormals, or nothing.
MAGNITUDES = [1.0, 1e-6, 1e-37, 1e-38, 1e-42, 0.0]


def make(shape: tuple[int, ...], double_quant: bool = True, magnitude: float = 1.0, seed: int = 0) -> NF4Array:
    """Random codes and scales of this magnitude."""
    rng = np.random.default_rng(seed)
    q = jax.eval_shape(lambda w: quantize_nf4(w, double_quant=double_quant), jax.ShapeDtypeStruct(shape, jnp.float32))

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == jnp.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        return (rng.uniform(0.5, 2, leaf.shape) * magnitude).astype(np.float32)

    return jax.tree.map(fill, q)


def assert_bits(actual: jax.Array | np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    unsigned = {2: np.uint16, 4: np.uint32}[expected.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(actual).view(unsigned), expected.view(unsigned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 192), (300, 64), (1, 32768), (7, 66), (2, 48)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_values(shape: tuple[int, int], double_quant: bool, dtype: jnp.dtype, reference: Reference):
    q = make(shape, double_quant)
    assert_bits(dequantize_nf4(q, dtype), reference(q, jnp.dtype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("shape", [(16, 128), (5, 34)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_denormals(
    shape: tuple[int, int], double_quant: bool, magnitude: float, dtype: jnp.dtype, reference: Reference
):
    q = make(shape, double_quant, magnitude)
    assert_bits(dequantize_nf4(q, dtype), reference(q, jnp.dtype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tiny_scale_among_ordinary_ones(dtype: jnp.dtype, reference: Reference):
    q = make((16, 128), double_quant=False)
    scales = np.array(q.scales)
    scales[3, 1], scales[4, 0] = 3e-39, 5e-38
    q = dataclasses.replace(q, scales=scales)
    assert_bits(dequantize_nf4(q, dtype), reference(q, jnp.dtype(dtype)))


def test_tiny_offsets_under_ordinary_nested_scales(reference: Reference):
    """Scales that are ordinary themselves, though a product that enters them underflows."""
    q = make((4096, 64))
    for offset in (2.0**-99, 2.0**-101, 2.0**-124, 2.0**-140, 0.0):
        nested = np.geomspace(2.0**-149, 1, q.nested_scales.size, dtype=np.float64).astype(np.float32)
        tiny = dataclasses.replace(q, offset=np.float32(offset), nested_scales=nested.reshape(q.nested_scales.shape))
        assert_bits(dequantize_nf4(tiny, jnp.float32), reference(tiny))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "double_quant"), [((512, 64), True), ((16, 128), False), ((7, 66), True)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-6])
def test_what_a_gpu_computes(
    shape: tuple[int, int], double_quant: bool, magnitude: float, dtype: jnp.dtype, reference: Reference
):
    """The same in float32, which the CPU too does exactly where nothing is denormal.

    Fused into a multiply-add, one scale in four would differ.
    """
    q = make(shape, double_quant, magnitude)
    in_float32 = jax.jit(lambda q: dequantize._in_float32(q, jnp.dtype(dtype)))
    assert_bits(in_float32(q), reference(q, jnp.dtype(dtype)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_conversion_after_it_is_not_skipped(dtype: jnp.dtype, reference: Reference):
    q = make((16, 128))
    widened = jax.jit(lambda q: dequantize_nf4(q, dtype).astype(jnp.float32))(q)
    assert_bits(widened, reference(q, jnp.dtype(dtype)).astype(np.float32))


def test_own_nested_map(reference: Reference):
    entries = tuple(np.linspace(-1, 1, 256, dtype=np.float32).tolist())
    q = dataclasses.replace(make((16, 128)), nested_map=entries)
    assert_bits(dequantize_nf4(q, jnp.float32), reference(q))
    assert not np.array_equal(reference(q), reference(dataclasses.replace(q, nested_map=None)))


@pytest.mark.parametrize("shape", [(8, 128), (5, 34)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_stacks(shape: tuple[int, int], double_quant: bool, reference: Reference):
    q = make((3, 2, *shape), double_quant)
    w = np.asarray(dequantize_nf4(q, jnp.float32))
    for i, j in np.ndindex(3, 2):
        one = jax.tree.map(lambda leaf: leaf[i, j], q)  # noqa: B023
        assert_bits(w[i, j], reference(one))
    scanned = jax.lax.map(lambda one: dequantize_nf4(one, jnp.float32), jax.tree.map(lambda leaf: leaf[:, 1], q))
    np.testing.assert_array_equal(scanned, w[:, 1])


@pytest.mark.parametrize(
    ("shape", "spec", "devices"),
    [
        ((64, 1024), P("a", None), (4, 2)),  # 16 rows a run of scales: whole cells a shard
        ((64, 1024), P(None, "b"), (4, 2)),  # one column of cells, of which each shard sees a part
        ((64, 1024), P("a", "b"), (4, 2)),
        ((8, 32768), P("a", "b"), (4, 2)),  # columns of cells, split
        ((8, 384), P("a", "b"), (2, 3)),  # repeated cells
    ],
)
def test_shards_unpack_by_themselves(shape: tuple[int, int], spec: P, devices: tuple[int, int]):
    mesh = jax.make_mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    q = make(shape)
    unpack = jax.shard_map(dequantize_nf4, mesh=mesh, in_specs=(nf4_partition_specs(q, spec),), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(unpack)(q), dequantize_nf4(q))


def test_gpu_program_is_plain_float32():
    """No look at the data and no float64 where denormals need no care."""
    text = jax.jit(dequantize_nf4).trace(make((16, 128))).lower(lowering_platforms=("cuda",)).as_text()
    assert "reduce_precision" in text
    assert not re.search(r"f64>|stablehlo.if|stablehlo.reduce\b", text)


def test_unknown_dtype_and_implementation():
    q = make((2, 64))
    with pytest.raises(TypeError, match="int8"):
        dequantize_nf4(q, jnp.int8)
    with pytest.raises(ValueError, match="xla"):
        dequantize_nf4(q, implementation="triton")
