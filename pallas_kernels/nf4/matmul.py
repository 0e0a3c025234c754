"""y = x W^T with a packed W: the frozen linear of QLoRA, and its backward.

With cotangent g of y [..., out], the only gradient is

    dx = g W            [..., out] [out, in] -> [..., in]

W is frozen: it gets no gradient, and since dx depends on W alone, nothing of x is saved. What is saved is W as it is
packed; either pass unpacks it to 16 bits for the moment of its product. Unpacking waits for the other factor: it
depends on nothing else, so a compiler that sees several layers would be free to unpack them all ahead, or to unpack
once for forward and backward, and the unpacked weights of all layers would then be in memory together.

Implementations: `xla` unpacks, then lets cuBLAS multiply; `triton` (fused.py) decodes in registers, for tokens by the
dozen. For each pass and shape that one runs which the device's tile table says is faster; without an entry, `xla`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.nf4.array import NF4Array
from pallas_kernels.nf4.dequantize import dequantize_nf4
from pallas_kernels.nf4.fused import fused_obstacle, input_gradient, product
from pallas_kernels.tuning import bucket, choice

PASSES = ("forward", "input_gradient")


@dataclasses.dataclass(frozen=True)
class Way:
    """By which implementation a pass goes."""

    implementation: str

    def __post_init__(self) -> None:
        if self.implementation not in ("triton", "xla"):
            raise ValueError(f"{self.implementation=} must be triton or xla.")


XLA = Way("xla")


def nf4_matmul(x: Float[Array, "... in"], q: NF4Array, *, implementation: str | None = None) -> Float[Array, "... out"]:
    """x @ W^T in x's dtype, accumulated in float32; differentiable in x only.

    Args:
        x: float32 (then multiplied as such, never as tf32), bfloat16 or float16 [..., in].
        q: one packed matrix [out, in], unpacked to x's dtype. Of a stack, scan over or index the leaves.
        implementation: "triton" (decode in registers; 16-bit x, `in` a multiple of 64) or "xla" (unpack, then a dense
            product), for both passes.

    Works on shards: of rows (dx is then a partial sum) or of columns (y is). A shard_map that checks what varies along
    which axis wants x marked as varying along those that shard q (`jax.lax.pcast`).
    """
    if q.ndim != 2:
        raise ValueError(f"nf4_matmul takes one matrix [out, in], but {q.shape=} is a stack; scan over it.")
    if x.ndim == 0 or x.shape[-1] != q.shape[-1]:
        raise ValueError(f"nf4_matmul needs x [..., in] for a weight [out, in], but {x.shape=} and {q.shape=}.")
    return _matmul(ways(x, q, implementation), x, q)


def ways(x: jax.Array, q: NF4Array, implementation: str | None = None) -> tuple[str, str]:
    """The implementations of the forward pass and of the input gradient."""
    obstacle = fused_obstacle(x, q)
    if implementation is not None:
        name = choose_implementation("nf4_matmul", implementation, {"triton": obstacle, "xla": None})
        return name, name
    if obstacle is not None:
        return "xla", "xla"
    tokens, (out, width) = bucket(math.prod(x.shape[:-1])), q.shape
    forward, backward = (choice(f"nf4_matmul.{which}", XLA, tokens=tokens, out=out, width=width) for which in PASSES)
    return forward.implementation, backward.implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(ways: tuple[str, str], x: jax.Array, q: NF4Array) -> jax.Array:
    if ways[0] == "triton":
        return product(x.reshape(-1, x.shape[-1]), q).reshape(*x.shape[:-1], -1)
    return _contract(x, dequantize_nf4(_after(x, q), x.dtype), weight_axis=1)


def _forward(ways: tuple[str, str], x: jax.Array, q: NF4Array) -> tuple[jax.Array, NF4Array]:
    return _matmul(ways, x, q), q


def _backward(ways: tuple[str, str], q: NF4Array, g: jax.Array) -> tuple[jax.Array, None]:
    if ways[1] == "triton":
        return input_gradient(g.reshape(-1, g.shape[-1]), q).reshape(*g.shape[:-1], -1), None
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
