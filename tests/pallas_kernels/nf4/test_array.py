"""The container: geometry, sizes, invariants, specs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.nf4 import NF4Array, check_nf4, nf4_partition_specs, quantize_nf4
from pallas_kernels.nf4.array import nested_grid, nested_runs


def packed_shape(shape: tuple[int, ...], double_quant: bool = True) -> NF4Array:
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.eval_shape(lambda w: quantize_nf4(w, double_quant=double_quant), w)


@pytest.mark.parametrize(
    ("shape", "double_quant", "bits"),
    [
        ((4096, 4096), True, 4.127),
        ((14336, 4096), True, 4.127),
        ((3, 14336, 4096), True, 4.127),
        ((4096, 4096), False, 4.5),
        ((5000, 1001), True, 4.127),
    ],
)
def test_bits_per_weight(shape: tuple[int, ...], double_quant: bool, bits: float):
    q = packed_shape(shape, double_quant)
    assert q.bits_per_weight == pytest.approx(bits, abs=5e-4)
    assert q.nbytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))
    assert q.shape == shape
    assert q.ndim == len(shape)


@pytest.mark.parametrize(
    ("shape", "cell", "grid"),
    [
        ((4096, 4096), (4, 64), (1024, 1)),  # several rows a run
        ((3, 64), (256, 1), (1, 1)),  # fewer scales than one run
        ((5, 32768), (1, 256), (5, 2)),  # several runs a row
        ((6, 11008), (1, 4), (6, 43)),  # runs that end inside rows
        ((4096, 14336), (1, 32), (4096, 7)),
    ],
)
def test_nested_grid_is_rectangles_of_runs(shape: tuple[int, int], cell: tuple[int, int], grid: tuple[int, int]):
    q = packed_shape(shape)
    assert q.nested_cell == cell
    assert q.nested_scales is not None
    assert q.nested_scales.shape == grid
    out, columns = shape[0], shape[1] // 64
    runs = np.arange(-(-out * columns // 256), dtype=np.float32)
    cells = nested_grid(runs, out, columns)
    for row, column in [(0, 0), (out // 2, columns // 2), (out - 1, columns - 1)]:
        assert cells[row // cell[0], column // cell[1]] == (row * columns + column) // 256
    full = dataclasses.replace(q, nested_scales=cells)
    np.testing.assert_array_equal(nested_runs(full), runs)


@pytest.mark.parametrize("shape", [(8, 128), (5, 34)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_is_a_pytree(shape: tuple[int, int], double_quant: bool):
    q = quantize_nf4(jnp.ones(shape), double_quant=double_quant)
    leaves, structure = jax.tree.flatten(q)
    assert len(leaves) == (4 if double_quant else 2)
    again = jax.tree.unflatten(structure, leaves)
    assert again.shape == q.shape == shape
    check_nf4(again)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), q)
    check_nf4(stack)
    assert stack.shape == (3, *shape)
    check_nf4(jax.tree.map(lambda leaf: leaf[0], stack))
    assert "shape=" in repr(q)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codes": jnp.zeros((8, 65), jnp.uint8)}, "codes"),
        ({"codes": jnp.zeros((8, 64), jnp.int8)}, "codes"),
        ({"scales": jnp.zeros((8, 3), jnp.uint8)}, "scales"),
        ({"scales": jnp.zeros((8, 2), jnp.float32)}, "scales"),
        ({"nested_scales": jnp.zeros((2, 1))}, "nested_scales"),
        ({"nested_scales": None}, "nested_scales"),
        ({"nested_cell": None}, "nested_cell"),
        ({"nested_cell": (4, 2)}, "nested_scales"),
        ({"offset": jnp.zeros((1,))}, "offset"),
        ({"flat_shape": (8, 128)}, "flat_shape"),
        ({"nested_map": (1.0,)}, "nested_map"),
        ({"layout": "columns"}, "layout"),
    ],
)
def test_broken_invariants_are_named(change: dict, named: str):
    q = quantize_nf4(jnp.ones((8, 128)))
    with pytest.raises(ValueError, match=named):
        check_nf4(dataclasses.replace(q, **change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codes": jnp.zeros((84,), jnp.uint8)}, "codes"),
        ({"scales": jnp.zeros((2,), jnp.uint8)}, "scales"),
        ({"nested_scales": jnp.zeros((2,))}, "nested_scales"),
        ({"flat_shape": None}, "flat_shape"),
        ({"flat_shape": (5, 33)}, "odd"),
    ],
)
def test_broken_invariants_of_the_flat_layout_are_named(change: dict, named: str):
    q = quantize_nf4(jnp.ones((5, 34)))
    with pytest.raises(ValueError, match=named):
        check_nf4(dataclasses.replace(q, **change))


def test_partition_specs():
    specs = nf4_partition_specs(packed_shape((2, 512, 4096)), P(None, "out", "in"))
    assert specs.codes == specs.scales == P(None, "out", "in")
    assert specs.nested_scales == P(None, "out", None)  # one column of cells: kept whole along `in`
    assert specs.offset == P(None)
    specs = nf4_partition_specs(packed_shape((512, 32768)), P("out", "in"))
    assert specs.nested_scales == P("out", "in")
    assert nf4_partition_specs(packed_shape((512, 4096), double_quant=False), P("out")).scales == P("out", None)
    with pytest.raises(ValueError, match="cannot be sharded"):
        nf4_partition_specs(packed_shape((5, 34)), P("out", None))
    assert nf4_partition_specs(packed_shape((5, 34)), P()).codes == P()
