"""Rotary position embedding: pairs of a head's dimensions turned by an angle that grows with the position.

Dimensions i and i + D/2 of a head form a pair (the "rotate half" convention of Hugging Face's Llama, not neighbours
2i, 2i+1). Position p turns the pair by a = p f_i:

    y_i = x_i cos a - x_{i+D/2} sin a          y_{i+D/2} = x_{i+D/2} cos a + x_i sin a

A rotation's transpose is the rotation back, so the backward pass is the same with -sin, and it needs cos and sin only.
They are made in float32 once for all layers, and the turn is computed in float32: angles of far positions, and their
cosines, do not survive 16 bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import check_floats, choose_implementation


def rope_angles(
    positions: Int[Array, "B S"], inv_freq: Float[Array, "D/2"], scaling: float = 1.0
) -> tuple[Float[Array, "B S D/2"], Float[Array, "B S D/2"]]:
    """cos and sin of position * inv_freq in float32, both times `scaling`."""
    angles = positions.astype(jnp.float32)[..., None] * inv_freq.astype(jnp.float32)[None, None]
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rope(
    x: Float[Array, "B S N D"],
    cos: Float[Array, "B S D/2"],
    sin: Float[Array, "B S D/2"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B S N D"]:
    """x with its pairs turned, in x's dtype. cos and sin are constants: they get no gradient."""
    choose_implementation("apply_rope", implementation, {"xla": None})
    check_floats("apply_rope", x=x, cos=cos, sin=sin)
    expected = (*x.shape[:2], x.shape[-1] // 2)
    if x.ndim != 4 or x.shape[-1] % 2 or cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"{cos.shape=} and {sin.shape=} do not fit {x.shape=}: x is [B, S, N, D] with D even, "
            "cos and sin are [B, S, D/2]."
        )
    return _apply_rope(x, cos, sin)


def apply_rope_reference(x: Float[Array, "B S N D"], cos: Float[Array, "B S D/2"], sin: Float[Array, "B S D/2"]):
    """The same math in the dtype of its arguments."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.custom_vjp
def _apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    turned = apply_rope_reference(x.astype(jnp.float32), cos.astype(jnp.float32), sin.astype(jnp.float32))
    return turned.astype(x.dtype)


def _forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _apply_rope(x, cos, sin), (cos, sin)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = saved
    return _apply_rope(g, cos, -sin), None, None


_apply_rope.defvjp(_forward, _backward)
