"""y = x W^T with a packed W: the frozen linear of QLoRA, and its backward.

With cotangent g of y [..., out], the only gradient is

    dx = g W            [..., out] [out, in] -> [..., in]

W is frozen: it gets no gradient, and since dx depends on W alone, nothing of x is saved. What is saved is W as it is
packed; either pass unpacks it to 16 bits for the moment of its product. Unpacking waits for the other factor: it
depends on nothing else, so a compiler that sees several layers would be free to unpack them all ahead, or to unpack
once for forward and backward, and the unpacked weights of all layers would then be in memory together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.nf4.array import NF4Array
from pallas_kernels.nf4.dequantize import dequantize_nf4


def nf4_matmul(x: Float[Array, "... in"], q: NF4Array, *, implementation: str | None = None) -> Float[Array, "... out"]:
    """x @ W^T in x's dtype, accumulated in float32; differentiable in x only.

    Args:
        x: float32 (then multiplied as such, never as tf32), bfloat16 or float16 [..., in].
        q: one packed matrix [out, in], unpacked to x's dtype. Of a stack, scan over or index the leaves.
        implementation: "xla" (unpack, then a dense product), the only one there is.

    Works on shards: of rows (dx is then a partial sum) or of columns (y is). A shard_map that checks what varies along
    which axis wants x marked as varying along those that shard q (`jax.lax.pcast`).
    """
    choose_implementation("nf4_matmul", implementation, {"xla": None})
    if q.ndim != 2:
        raise ValueError(f"nf4_matmul takes one matrix [out, in], but {q.shape=} is a stack; scan over it.")
    if x.ndim == 0 or x.shape[-1] != q.shape[-1]:
        raise ValueError(f"nf4_matmul needs x [..., in] for a weight [out, in], but {x.shape=} and {q.shape=}.")
    return _matmul(x, q)


@jax.custom_vjp
def _matmul(x: jax.Array, q: NF4Array) -> jax.Array:
    return _contract(x, dequantize_nf4(_after(x, q), x.dtype), weight_axis=1)


def _forward(x: jax.Array, q: NF4Array) -> tuple[jax.Array, NF4Array]:
    return _matmul(x, q), q


def _backward(q: NF4Array, g: jax.Array) -> tuple[jax.Array, None]:
    return _contract(g, dequantize_nf4(_after(g, q), g.dtype), weight_axis=0), None


_matmul.defvjp(_forward, _backward)


def _after(x: jax.Array, q: NF4Array) -> NF4Array:
    """q, in a form that only x's arrival makes known: its codes XOR a zero that leaves a barrier together with x.

    The codes themselves would do, but behind a barrier a layer's slice of a stack is copied instead of read in place.
    """
    zero, _ = lax.optimization_barrier((jnp.uint8(0), x))
    return dataclasses.replace(q, codes=q.codes ^ zero)


def _contract(x: jax.Array, weight: jax.Array, weight_axis: int) -> jax.Array:
    """Contracts x's last axis with one of the weight's; the result is in x's dtype."""
    dimensions = (((x.ndim - 1,), (weight_axis,)), ((), ()))
    product = lax.dot_general(
        x, weight, dimensions, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32
    )
    return product.astype(x.dtype)
