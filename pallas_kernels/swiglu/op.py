"""The gated activation of Llama's MLP, silu(gate) * up, whose backward pass keeps its inputs only.

With s = 1 / (1 + exp(-gate)):

    y = gate s up          dup = g gate s          dgate = g up s (1 + gate (1 - s))

the last from ds/dgate = s (1 - s). Saved: gate and up, which the matmuls before it made; y is cheap to make again and
s cheaper. The arithmetic is float32, rounded once at the end to the inputs' dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import check_floats, choose_implementation


def swiglu(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], *, implementation: str | None = None
) -> Float[Array, "*shape"]:
    """silu(gate) * up, element by element, in gate's dtype."""
    choose_implementation("swiglu", implementation, {"xla": None})
    check_floats("swiglu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must agree in dtype and shape.")
    return _swiglu(gate, up)


def swiglu_reference(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same math in the dtype of its arguments."""
    return gate / (1 + jnp.exp(-gate)) * up


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    wide = gate.astype(jnp.float32)
    return (wide * jax.lax.logistic(wide) * up.astype(jnp.float32)).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _swiglu(gate, up), (gate, up)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = saved[0].dtype
    gate, up, g = (array.astype(jnp.float32) for array in (*saved, g))
    s = jax.lax.logistic(gate)
    dgate = g * up * s * (1 + gate * (1 - s))
    return dgate.astype(dtype), (g * gate * s).astype(dtype)


_swiglu.defvjp(_forward, _backward)
