"""A low-rank product, s (x A) B, whose backward pass keeps little and gives the factors' gradients in float32.

With z = s x A [T, r] and cotangent g of y = z B:

    dB = z^T g          dz = g B^T          dA = s x^T dz          dx = s dz A^T

Saved: x (which the caller holds anyway) and z. A and B arrive in float32 and are used in x's dtype; matrix products
accumulate in float32, and dA, dB leave as such, where autodiff through the cast would round them to x's dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _matmul(x: jax.Array, y: jax.Array, contract: tuple[int, int], out_dtype: jnp.dtype) -> jax.Array:
    """Contract one axis of each of two matrices; float32 is multiplied as float32, never as tf32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=out_dtype)


@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    return _forward(x, a, b, scale)[0]


def _forward(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple]:
    z = (_matmul(x, a.astype(x.dtype), (1, 0), jnp.dtype(jnp.float32)) * scale).astype(x.dtype)
    return _matmul(z, b.astype(x.dtype), (1, 0), x.dtype), (x, z, a, b, scale)


def _backward(saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x, z, a, b, scale = saved
    f32 = jnp.dtype(jnp.float32)
    db = _matmul(z, g, (0, 0), f32)
    dz = (_matmul(g, b.astype(g.dtype), (1, 1), f32) * scale).astype(x.dtype)
    da = _matmul(x, dz, (0, 0), f32)
    dx = _matmul(dz, a.astype(x.dtype), (1, 1), x.dtype)
    return dx, da.astype(a.dtype), db.astype(b.dtype), jnp.zeros_like(scale)


_low_rank.defvjp(_forward, _backward)


def low_rank_matmul(
    x: Float[Array, "... in"], a: Float[Array, "in r"], b: Float[Array, "r out"], scale: Float[Array, ""]
) -> Float[Array, "... out"]:
    """scale * (x @ a) @ b in x's dtype. `scale` is a constant of the layer: it gets no gradient."""
    rows = x.reshape(-1, x.shape[-1])
    return _low_rank(rows, a, b, jnp.asarray(scale, jnp.float32)).reshape(*x.shape[:-1], b.shape[-1])
