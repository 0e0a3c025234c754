"""Rotary embedding against complex multiplication in numpy, its backward pass, and the angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import apply_rope, apply_rope_reference, rope_angles

# relative, for each element: the result is rounded once
BOUNDS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 8), (1, 33, 4, 64), (3, 7, 1, 22)]


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def inputs(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    x, g = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    positions = rng.integers(0, 5000, size=shape[:2]).astype(np.int32)
    inv_freq = 500000.0 ** -(np.arange(0, shape[-1], 2, dtype=np.float32) / shape[-1])
    return x, g, *rope_angles(jnp.asarray(positions), jnp.asarray(inv_freq))


def turned(x, cos, sin, sign):
    """Dimensions i and i + D/2 as one complex number, times exp(±ia)."""
    x, cos, sin = (np.asarray(array, np.float64) for array in (x, cos, sin))
    half = x.shape[-1] // 2
    y = (x[..., :half] + 1j * x[..., half:]) * (cos + sign * 1j * sin)[:, :, None]
    return np.concatenate([y.real, y.imag], axis=-1)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    x, g, cos, sin = inputs(shape, dtype)

    @jax.jit
    def run(x, g, cos, sin):
        y, pull = jax.vjp(lambda x: apply_rope(x, cos, sin), x)
        return y, *pull(g)

    y, dx = run(x, g, cos, sin)
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), turned(x, cos, sin, 1), rtol=BOUNDS[dtype], atol=1e-6)
    np.testing.assert_allclose(np.asarray(dx, np.float64), turned(g, cos, sin, -1), rtol=BOUNDS[dtype], atol=1e-6)


def test_backward_is_the_derivative_of_the_reference():
    """Also with cos and sin that are no rotation's, as YaRN's attention factor makes them."""
    x, g, cos, sin = inputs((2, 5, 3, 8), "float32")
    ours = jax.vjp(lambda x: apply_rope(x, 1.3 * cos, 1.3 * sin), x)[1](g)[0]
    with jax.enable_x64(True):
        x, g, cos, sin = (jnp.asarray(np.asarray(array, np.float64)) for array in (x, g, cos, sin))
        truth = jax.vjp(lambda x: apply_rope_reference(x, 1.3 * cos, 1.3 * sin), x)[1](g)[0]
    assert error(ours, truth) < 1e-6


def test_scores_depend_on_distance_only():
    q, k, *_ = inputs((1, 1, 1, 64), "float32")
    inv_freq = 10000.0 ** -(jnp.arange(0, 64, 2, dtype=jnp.float32) / 64)

    def score(query_position, key_position):
        turn = lambda x, p: apply_rope(x, *rope_angles(jnp.full((1, 1), p, jnp.int32), inv_freq))  # noqa: E731
        return float((turn(q, query_position) * turn(k, key_position)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 0.1


def test_angles():
    positions = np.array([[0, 1, 131071], [5, 0, 77777]], np.int32)
    inv_freq = np.array([1.0, 0.31, 1e-5], np.float32)
    angles = (positions[..., None].astype(np.float32) * inv_freq).astype(np.float64)
    cos, sin = jax.jit(rope_angles, static_argnums=2)(positions, inv_freq, 1.25)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, 1.25 * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, 1.25 * np.sin(angles), atol=1e-6)


def test_keeps_the_angles_only():
    x, _, cos, sin = inputs((2, 5, 3, 8), "bfloat16")
    kept = jax.tree.leaves(jax.vjp(lambda x: apply_rope(x, cos, sin), x)[1])
    assert [(k.shape, k.dtype.name) for k in kept] == [((2, 5, 4), "float32")] * 2


def test_refuses():
    x, _, cos, sin = inputs((2, 5, 3, 8), "float32")
    with pytest.raises(ValueError, match=r"cos.shape=\(2, 5, 8\) and .* do not fit x.shape=\(2, 5, 3, 8\)"):
        apply_rope(x, jnp.tile(cos, 2), sin)
    with pytest.raises(TypeError, match="apply_rope takes floating-point arrays, but x is int32"):
        apply_rope(x.astype(jnp.int32), cos, sin)
    with pytest.raises(ValueError, match="apply_rope has no implementation='cudnn'; use one of xla"):
        apply_rope(x, cos, sin, implementation="cudnn")
