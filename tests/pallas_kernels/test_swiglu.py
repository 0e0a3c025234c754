"""silu(gate) * up against float64, far values, and what the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.swiglu import swiglu, swiglu_reference

# relative, for each element: the result is rounded once
BOUNDS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
SHAPES = [(1,), (3, 507), (2, 5, 64)]


def inputs(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    return [jnp.asarray(scale * rng.normal(size=shape), dtype) for scale in (4, 1, 1)]


def forward_and_backward(function, gate, up, g):
    @jax.jit
    def run(gate, up, g):
        y, pull = jax.vjp(function, gate, up)
        return y, *pull(g)

    return run(gate, up, g)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    arrays = inputs(shape, dtype)
    results = forward_and_backward(swiglu, *arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        truth = forward_and_backward(swiglu_reference, *wide)
    for result, expected in zip(results, truth, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=BOUNDS[dtype], atol=1e-5)


def test_gradient_is_the_slope():
    """Central differences of the formula in numpy."""
    rng = np.random.default_rng(0)
    gate, up, g, dgate, dup = rng.normal(size=(5, 40))

    def loss(t):
        moved = gate + t * dgate
        return np.sum(g * moved / (1 + np.exp(-moved)) * (up + t * dup))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    _, *grads = forward_and_backward(swiglu, *(jnp.asarray(array, jnp.float32) for array in (gate, up, g)))
    assert np.sum(grads[0] * dgate) + np.sum(grads[1] * dup) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_far_values(dtype):
    """Where exp overflows, silu is 0 or the identity."""
    gate = jnp.asarray([-6e4, -200, 200, 6e4], dtype)
    y, dgate, dup = forward_and_backward(swiglu, gate, jnp.full_like(gate, 0.5), jnp.ones_like(gate))
    np.testing.assert_array_equal(np.asarray(y, np.float64), [0, 0, 0.5 * gate[2], 0.5 * gate[3]])
    np.testing.assert_array_equal(np.asarray(dgate, np.float64), [0, 0, 0.5, 0.5])
    np.testing.assert_array_equal(np.asarray(dup, np.float64), [0, 0, gate[2], gate[3]])


def test_keeps_its_arguments_only():
    gate, up, _ = inputs((6, 32), "bfloat16")
    kept = jax.tree.leaves(jax.vjp(swiglu, gate, up)[1])
    assert [(k.shape, k.dtype.name) for k in kept] == [((6, 32), "bfloat16")] * 2


def test_refuses():
    gate, up, _ = inputs((6, 32), "float32")
    with pytest.raises(ValueError, match=r"gate float32\(6, 32\) and up float32\(6, 31\) must agree"):
        swiglu(gate, up[:, :31])
    with pytest.raises(ValueError, match="must agree in dtype"):
        swiglu(gate, up.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="swiglu takes floating-point arrays, but gate is int32"):
        swiglu(gate.astype(jnp.int32), up.astype(jnp.int32))
    with pytest.raises(ValueError, match="swiglu has no implementation='mosaic'; use one of xla"):
        swiglu(gate, up, implementation="mosaic")
