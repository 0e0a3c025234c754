"""The frozen linear with LoRA beside it: values and all gradients against float64, by either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4 import NF4Slice, dequantize_nf4, fused, nf4_matmul, quantize_nf4

BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
RANK, SCALE = 3, 0.7


@pytest.fixture(autouse=True)
def lightly() -> None:
    """What is tested does not turn on how well XLA optimises; every test's set-up undoes this."""
    jax.config.update("jax_disable_most_optimizations", True)


def arrays(shape: tuple[int, int], dtype: str) -> tuple:
    """q, x, g, and the factors, which a model keeps in float32."""
    out, width = shape
    rng = np.random.default_rng(0)
    x, g, w = (rng.standard_normal(size, np.float32) for size in ((2, 5, width), (2, 5, out), shape))
    a, b = (jnp.asarray(rng.standard_normal(size, np.float32)) for size in ((width, RANK), (RANK, out)))
    return quantize_nf4(jnp.asarray(w)), jnp.asarray(x, dtype), jnp.asarray(g, dtype), a, b


def exact(w: np.ndarray, *others: jax.Array) -> tuple[np.ndarray, ...]:
    x, g, a, b = (np.asarray(each, np.float64) for each in others)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    z, dz = SCALE * x @ a, SCALE * g @ b.T
    return x @ w.T + z @ b, g @ w + dz @ a.T, x.T @ dz, z.T @ g


@pytest.mark.parametrize(("shape", "dtype"), [((33, 128), "float32"), ((9, 34), "bfloat16"), ((33, 128), "float16")])
def test_values_and_gradients(shape: tuple[int, int], dtype: str) -> None:
    q, x, g, a, b = arrays(shape, dtype)

    @jax.jit
    def both(x, a, b, g):
        y, pullback = jax.vjp(lambda x, a, b: nf4_matmul(x, q, a=a, b=b, scale=SCALE), x, a, b)
        return y, *pullback(g)

    got = both(x, a, b, g)
    assert [each.dtype for each in got] == [x.dtype, x.dtype, jnp.float32, jnp.float32]
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)
    for ours, right in zip(got, exact(w, x, g, a, b), strict=True):
        ours = np.asarray(ours, np.float64).reshape(right.shape)
        assert np.linalg.norm(ours - right) <= BOUNDS[dtype] * np.linalg.norm(right)


def test_kernels_take_it_in_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are given is what the other way multiplies: operands with z and dz in place, and the other factors."""
    q, x, g, a, b = arrays((33, 128), "float16")
    w = dequantize_nf4(q, jnp.float32)
    monkeypatch.setattr(fused, "triton_obstacle", lambda: None)

    def product(x: jax.Array, one: NF4Slice, beside: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) @ jnp.concatenate([w, beside.astype(jnp.float32)], axis=1).T).astype(x.dtype)

    def input_gradient(g: jax.Array, one: NF4Slice, below: jax.Array) -> jax.Array:
        return (g.astype(jnp.float32) @ jnp.concatenate([w, below.astype(jnp.float32)], axis=0)).astype(g.dtype)

    monkeypatch.setattr(fused, "product", product)
    monkeypatch.setattr(fused, "input_gradient", input_gradient)
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, q, a=a, b=b, scale=SCALE, implementation="triton"), x)
    for ours, right in zip((y, *pullback(g)), exact(np.asarray(w, np.float64), x, g, a, b)[:2], strict=True):
        ours = np.asarray(ours, np.float64).reshape(right.shape)
        assert np.linalg.norm(ours - right) <= BOUNDS["float16"] * np.linalg.norm(right)


@pytest.mark.parametrize("factors", [("a", None), (None, "b"), ("b", "a")])
def test_factors_that_do_not_fit(factors: tuple) -> None:
    q, x, _, a, b = arrays((33, 128), "float32")
    given = {"a": a, "b": b, None: None}
    with pytest.raises(ValueError, match=r"needs a \[in, r\] and b \[r, out\]"):
        nf4_matmul(x, q, a=given[factors[0]], b=given[factors[1]])
