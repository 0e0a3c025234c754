"""The norm against its math in float64: values, gradients, Hugging Face's order of rounding, what backward keeps."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.rms_norm import rms_norm, rms_norm_reference

BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}  # hardly more than rounding the result costs
SHAPES = [(1, 64), (3, 7, 64), (1, 1, 1), (5, 507), (2, 3, 2, 33), (4096, 8)]


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def inputs(shape, dtype, weight_dtype=None):
    """x with rows of very different sizes, a weight around 1, a cotangent."""
    rng = np.random.default_rng(sum(shape))
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    weight = 1 + 0.3 * rng.normal(size=shape[-1])
    g = 0.5 + rng.normal(size=shape)
    return jnp.asarray(x, dtype), jnp.asarray(weight, weight_dtype or dtype), jnp.asarray(g, dtype)


def forward_and_backward(function, x, weight, g):
    @jax.jit
    def run(x, weight, g):
        y, pull = jax.vjp(function, x, weight)
        return y, *pull(g)

    return run(x, weight, g)


def in_float64(x, weight, g, eps):
    with jax.enable_x64(True):
        x, weight, g = (jnp.asarray(np.asarray(array, np.float64)) for array in (x, weight, g))
        rows = x.reshape(-1, x.shape[-1]), weight, g.reshape(-1, x.shape[-1])
        return forward_and_backward(lambda x, weight: rms_norm_reference(x, weight, eps), *rows)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    x, weight, g = inputs(shape, dtype)
    eps = 1.0 if shape[-1] in (1, 33) else 1e-5  # large enough to be missed; alone, dx of one element would be noise
    results = forward_and_backward(lambda x, weight: rms_norm(x, weight, eps), x, weight, g)
    assert [(r.shape, r.dtype) for r in results] == [(a.shape, a.dtype) for a in (x, x, weight)]
    for result, expected in zip(results, in_float64(x, weight, g, eps), strict=True):
        assert error(result, expected.reshape(result.shape)) < BOUNDS[dtype]


def test_gradient_is_the_slope():
    """Central differences of a norm written out in numpy."""
    rng = np.random.default_rng(0)
    x, weight, g, dx, dw = (rng.normal(size=s) for s in ((3, 20), 20, (3, 20), (3, 20), 20))

    def loss(t):
        moved = x + t * dx
        rms = np.sqrt((moved**2).sum(-1, keepdims=True) / 20 + 1e-3)
        return np.sum(g * (weight + t * dw) * moved / rms)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    grads = jax.grad(lambda x, w: (rms_norm(x, w, 1e-3) * g.astype(np.float32)).sum(), (0, 1))(
        x.astype(np.float32), weight.astype(np.float32)
    )
    assert np.sum(grads[0] * dx) + np.sum(grads[1] * dw) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_rounds_as_hugging_face(dtype):
    """Normalise in float32, round, multiply by the weight, round. Rounding once instead changes many values."""
    x, weight, _ = (np.asarray(array) for array in inputs((64, 256), dtype))
    wide = x.astype(np.float32)
    n = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-6))
    expected = n.astype(dtype) * weight
    once = (n * weight.astype(np.float32)).astype(dtype)
    assert (expected != once).mean() > 0.1
    actual = jax.jit(rms_norm, static_argnums=2)(x, weight, 1e-6)
    assert (np.asarray(actual) == expected).mean() > 0.998


def test_weight_gradient_of_a_wider_weight():
    x, weight, g = inputs((3000, 16), "bfloat16", "float32")
    y, _, dweight = forward_and_backward(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight, g)
    assert y.dtype == jnp.bfloat16
    assert dweight.dtype == jnp.float32
    assert error(dweight, in_float64(x, weight, g, 1e-5)[2]) < 1e-5


def test_rows_of_zeros():
    x, weight, g = inputs((4, 32), "bfloat16")
    y, dx, dweight = forward_and_backward(lambda x, weight: rms_norm(x, weight, 1e-5), x * 0, weight, g)
    assert not y.any()
    assert not dweight.any()
    assert np.isfinite(np.asarray(dx, np.float32)).all()


def test_keeps_its_arguments_only():
    x, weight, _ = inputs((6, 32), "bfloat16")
    kept = jax.tree.leaves(jax.vjp(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)[1])
    assert sorted((k.shape, k.dtype.name) for k in kept) == [((6, 32), "bfloat16"), ((32,), "bfloat16")]


def test_refuses():
    x, weight, _ = inputs((6, 32), "float32")
    with pytest.raises(ValueError, match=r"weight.shape=\(31,\) must be \(32,\)"):
        rms_norm(x, weight[:31], 1e-5)
    with pytest.raises(ValueError, match="rms_norm has no implementation='cuda'; use one of triton, xla"):
        rms_norm(x, weight, 1e-5, implementation="cuda")
    with pytest.raises(ValueError, match=r"x.shape=\(3, 0\) must be \[..., H\]"):
        rms_norm(jnp.zeros((3, 0)), weight, 1e-5)
    with pytest.raises(TypeError, match="rms_norm takes floating-point arrays, but x is int32"):
        rms_norm(jnp.ones((6, 32), jnp.int32), weight, 1e-5)
    assert (rms_norm(x, weight, 1e-5, implementation="xla") == rms_norm(x, weight, 1e-5)).all()
