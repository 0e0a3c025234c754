"""Packing: what it accepts, and that how a matrix is processed does not change what comes out.

That the result is right is tested against bitsandbytes, in tests/parity.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.nf4 import NF4Array, all_finite, nf4_partition_specs, quantize, quantize_nf4


def weight(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)))
    return jnp.asarray(w.astype(np.float32).astype(dtype))


def assert_same(a: NF4Array, b: NF4Array) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("shape", [(24, 192), (7, 1026), (1, 20 * 64 + 30)])
def test_parts_do_not_matter(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    w = weight(shape)
    whole = quantize_nf4(w)
    monkeypatch.setattr(quantize, "PART_VALUES", 300)
    jax.clear_caches()
    assert_same(quantize_nf4(w), whole)
    jax.clear_caches()


@pytest.mark.parametrize("shape", [(8, 128), (5, 34)])
def test_a_stack_is_its_matrices(shape: tuple[int, int]):
    w = weight((2, 3, *shape))
    q = jax.tree.map(np.asarray, quantize_nf4(w))
    assert q.shape == w.shape
    assert q.offset is not None
    assert q.offset.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        one = jax.tree.map(lambda leaf: leaf[i, j], q)  # noqa: B023
        assert_same(one, quantize_nf4(np.asarray(w)[i, j]))


def test_inside_an_outer_program():
    w = weight((16, 128))

    @jax.jit
    def step(w: jax.Array) -> tuple[NF4Array, jax.Array]:
        total = jnp.sum(w)
        return quantize_nf4(w), total + 1

    q, total = step(w)
    assert total.dtype == jnp.float32  # float64 stays inside
    assert_same(q, quantize_nf4(w))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_conversion_before_it_is_not_skipped(dtype: jnp.dtype):
    """Narrowed in the same program, weights must be the narrowed ones, though a compiler may keep excess precision."""
    w = weight((16, 128))
    assert_same(jax.jit(lambda w: quantize_nf4(w.astype(dtype)))(w), quantize_nf4(w.astype(dtype)))


@pytest.mark.parametrize("shape", [(4096, 4096), (5000, 3002)])
def test_temporaries_are_small(shape: tuple[int, int]):
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    memory = jax.jit(quantize_nf4).lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16e6 < 0.6 * 2 * shape[0] * shape[1]


@pytest.mark.parametrize("spec", [P("a", None), P(None, "b"), P("a", "b"), P(("a", "b"), None)])
def test_sharded_weights_stay_where_they_are(spec: P):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    w = weight((128, 1024))
    whole = quantize_nf4(w)
    specs = nf4_partition_specs(whole, spec)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    program = jax.jit(quantize_nf4, out_shardings=shardings)
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    assert_same(program(sharded), whole)
    moved = re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", _compiled(program, sharded)
    )
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for _, dims in moved]
    assert max(sizes, default=0) <= w.size // 64  # of scales at most, never of weights


def _compiled(program: jax.stages.Wrapped, *args: jax.Array) -> str:
    text = program.lower(*args).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize(
    ("w", "error", "named"),
    [
        (jnp.zeros(64), ValueError, r"w.shape=\(64,\)"),
        (jnp.zeros((0, 64)), ValueError, r"w.shape=\(0, 64\)"),
        (jnp.zeros((3, 5)), ValueError, "odd number"),
        (jnp.zeros((2, 64), jnp.int32), TypeError, "int32"),
    ],
)
def test_what_cannot_be_packed(w: jax.Array, error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        quantize_nf4(w)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="xla"):
        quantize_nf4(jnp.zeros((2, 64)), implementation="mosaic")


def test_all_finite():
    w = weight((4, 64), jnp.bfloat16)
    assert all_finite(w)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite(w.at[2, 3].set(bad))
