"""Root-mean-square norm over the last axis, with a hand-derived backward pass.

    r = (mean_i x_i^2 + eps)^(-1/2)          n_i = x_i r          y_i = w_i n_i

With cotangent g of y and h_i = g_i w_i, from dr/dx_j = -r^3 x_j / H:

    dx_j = r h_j - (r^3 x_j / H) sum_i h_i x_i = r (h_j - n_j mean_i(h_i n_i))
    dw_i = sum over rows of g_i n_i

Saved: x and w, which the caller holds anyway; r is made again from x. All of it is float32 arithmetic. Forward alone, n
is rounded to x's dtype before it meets w, as Hugging Face's Llama does: a bf16 model then gives the same bits up to the
order of the sum under the root.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation


def rms_norm(
    x: Float[Array, "... H"], weight: Float[Array, "H"], eps: float, *, implementation: str | None = None
) -> Float[Array, "... H"]:
    """x / rms(x) * weight in x's dtype. The weight's gradient is a float32 sum, returned in the weight's dtype."""
    choose_implementation("rms_norm", implementation, {"xla": None})
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{weight.shape=} must be {x.shape[-1:]}, one weight per element of x's last axis.")
    return _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def rms_norm_reference(x: Float[Array, "T H"], weight: Float[Array, "H"], eps: float) -> Float[Array, "T H"]:
    """The same math in the dtype of its arguments."""
    return weight[None] * (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps))


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 with the precision of `dtype`. A pair of casts would say the same, but XLA may cancel it."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def _normalise(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """n [T, H] and r [T, 1] in float32."""
    wide = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * r, r


def _xla(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    n, _ = _normalise(x, eps)
    return (_rounded(n, x.dtype) * _rounded(weight, x.dtype)[None]).astype(x.dtype)


def _forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _xla(x, weight, eps), (x, weight)


def _backward(eps: float, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    n, r = _normalise(x, eps)
    g = g.astype(jnp.float32)
    h = g * _rounded(weight, x.dtype)[None]
    dx = r * (h - n * jnp.mean(h * n, axis=-1, keepdims=True))
    dweight = jnp.sum(g * n, axis=0)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_rms_norm = jax.custom_vjp(_xla, nondiff_argnums=(2,))
_rms_norm.defvjp(_forward, _backward)
