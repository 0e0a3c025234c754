"""The frozen linear: both passes, and what they keep in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.nf4 import NF4Array, dequantize_nf4, nf4_matmul, nf4_partition_specs, quantize_nf4

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def draw(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def packed(shape: tuple[int, ...], **kwargs: bool) -> NF4Array:
    return quantize_nf4(draw(shape, seed=7), **kwargs)


def assert_close(actual: jax.Array, expected: np.ndarray, dtype: jnp.dtype) -> None:
    """Within the rounding of the result to its dtype, and of float32 sums."""
    assert actual.dtype == dtype
    error = np.abs(np.asarray(actual, np.float64) - expected)
    ulp = float(jnp.finfo(dtype).eps) * np.abs(expected) + 1e-6 * np.abs(expected).max()
    assert (error <= ulp).all(), (error / ulp).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "double_quant"), [((96, 192), True), ((96, 192), False), ((9, 34), True)])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_both_passes(dtype: jnp.dtype, shape: tuple[int, int], double_quant: bool, lead: tuple[int, ...]):
    q = packed(shape, double_quant=double_quant)
    w = np.asarray(dequantize_nf4(q, dtype), np.float64)
    x, g = draw((*lead, shape[1]), dtype, 1), draw((*lead, shape[0]), dtype, 2)
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, q), x)
    assert_close(y, np.asarray(x, np.float64) @ w.T, dtype)
    assert_close(pullback(g)[0], np.asarray(g, np.float64) @ w, dtype)


def test_host_arrays():
    """A weight as it was read from a file."""
    q, x = packed((64, 128)), np.ones((3, 128), np.float32)
    on_host = jax.tree.map(np.asarray, q)
    np.testing.assert_array_equal(nf4_matmul(x, on_host), nf4_matmul(jnp.asarray(x), q))


def test_weight_gets_no_gradient():
    q, x = packed((64, 128)), draw((3, 128))
    _, pullback = jax.vjp(nf4_matmul, x, q)
    _, dq = pullback(jnp.ones((3, 64)))
    for leaf in jax.tree.leaves(dq):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint, jax.jit])
def test_nothing_but_the_packed_weight_is_saved(transform: Callable):
    """Neither x nor an unpacked weight: residuals are the packed leaves."""
    q, x = packed((256, 512)), draw((3, 512), jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: transform(nf4_matmul)(x, q), x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype") and leaf.size > 1]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= q.nbytes + x.nbytes * (transform is jax.checkpoint)
    assert {leaf.dtype for leaf in kept if leaf.size > x.size} <= {jnp.dtype(jnp.uint8)}


def layers(x: jax.Array, stack: NF4Array, scanned: bool = True) -> jax.Array:
    """Layers of a packed linear and a tanh, by scan or unrolled."""

    def layer(x: jax.Array, q: NF4Array) -> tuple[jax.Array, None]:
        return jnp.tanh(nf4_matmul(x, q)), None

    if scanned:
        return jax.lax.scan(layer, x, stack)[0]
    for i in range(stack.shape[0]):
        x, _ = layer(x, jax.tree.map(lambda leaf: leaf[i], stack))  # noqa: B023
    return x


@pytest.mark.parametrize("checkpointed", [True, False])
def test_scan_over_a_stack(checkpointed: bool):
    stack, x = packed((3, 64, 64)), draw((4, 64))
    w = dequantize_nf4(stack, jnp.float32)

    def dense(x: jax.Array) -> jax.Array:
        for matrix in w:
            x = jnp.tanh(x @ matrix.T)
        return x

    run = jax.checkpoint(layers) if checkpointed else layers
    y, pullback = jax.vjp(lambda x: run(x, stack), x)
    expected, expected_pullback = jax.vjp(dense, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pullback(y)[0], expected_pullback(y)[0], rtol=1e-4, atol=1e-4)


def test_scan_saves_nothing_of_the_weights_either():
    stack, x = packed((6, 128, 128)), draw((3, 128), jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: layers(x, stack), x)
    floats = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "dtype", jnp.uint8) != jnp.uint8]
    assert max(leaf.size for leaf in floats) < 128 * 128


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_weights_are_gone_after_use(scanned: bool, dtype: jnp.dtype):
    """In one program, one layer's weight is unpacked at a time, and no constant grows to a weight's size."""
    depth, width = 8, 256

    def loss(x: jax.Array, stack: NF4Array) -> jax.Array:
        return jnp.sum(layers(x, stack, scanned).astype(jnp.float32))

    x = jax.ShapeDtypeStruct((4, width), dtype)
    stack = jax.eval_shape(quantize_nf4, jax.ShapeDtypeStruct((depth, width, width), jnp.float32))
    memory = jax.jit(jax.grad(loss)).lower(x, stack).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * width * width * jnp.dtype(dtype).itemsize + stack.nbytes


@pytest.mark.parametrize("axes", [("rows", None), (None, "columns"), ("rows", "columns")])
def test_sharded(axes: tuple[str | None, str | None]):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = axes
    q, x, g = packed((64, 1024)), draw((3, 1024)), draw((3, 64), seed=3)

    def linear(x: jax.Array, q: NF4Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, q), x)
        (dx,) = pullback(g)
        return (jax.lax.psum(y, columns) if columns else y), (jax.lax.psum(dx, rows) if rows else dx)

    sharded = jax.shard_map(
        linear,
        mesh=mesh,
        in_specs=(P(None, columns), nf4_partition_specs(q, P(*axes)), P(None, rows)),
        out_specs=(P(None, rows), P(None, columns)),
        check_vma=False,
    )
    y, dx = jax.jit(sharded)(x, q, g)
    expected_y, pullback = jax.vjp(lambda x: nf4_matmul(x, q), x)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, pullback(g)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "shape", "named"),
    [((3, 128), (64, 192), r"x.shape=\(3, 128\)"), ((), (64, 128), r"x.shape=\(\)"), ((3, 128), (2, 64, 128), "stack")],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], shape: tuple[int, ...], named: str):
    with pytest.raises(ValueError, match=named):
        nf4_matmul(jnp.zeros(x), packed(shape))


def test_what_is_no_packed_weight_or_no_float():
    with pytest.raises(TypeError, match="nf4_matmul takes an NF4Array, as quantize_nf4 makes it of a weight, not"):
        nf4_matmul(jnp.zeros((3, 128)), jnp.zeros((64, 128)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="nf4_matmul takes float32, bfloat16 or float16, not"):
        nf4_matmul(jnp.zeros((3, 128), jnp.int32), packed((64, 128)))


def test_a_batch_without_rows():
    """Gives none, and factors of LoRA gradients of zero."""
    x, a, b = jnp.zeros((2, 0, 128)), jnp.ones((128, 4)), jnp.ones((4, 64))
    y, pull = jax.vjp(lambda *beside: nf4_matmul(beside[0], packed((64, 128)), a=beside[1], b=beside[2]), x, a, b)
    assert y.shape == (2, 0, 64)
    dx, da, db = pull(y)
    assert (dx.shape, da.shape, db.shape) == (x.shape, a.shape, b.shape)
    assert not np.any(da)
    assert not np.any(db)
    assert nf4_matmul(x, packed((64, 128))).shape == y.shape


def test_unknown_implementation():
    with pytest.raises(ValueError, match="xla"):
        nf4_matmul(jnp.zeros((1, 64)), packed((2, 64)), implementation="cudnn")
