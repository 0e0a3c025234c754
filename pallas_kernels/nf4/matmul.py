"""y = x W^T with a packed W: the frozen linear of QLoRA, its low-rank partner if there is one, and their backward.

With cotangent g of y [..., out], the only gradient is

    dx = g W            [..., out] [out, in] -> [..., in]

W is frozen: it gets no gradient, and since dx depends on W alone, nothing of x is saved. What is saved is W as it is
packed; either pass unpacks it to 16 bits for the moment of its product, if it does not decode it in registers
(products.py, which has the implementations, and chooses for each pass).

With LoRA's factors beside W and z = s x A [T, r], nothing but x and z is needed again, and each way is one product:

    y = [x z] [W B^T]^T        dz = s g B^T        dx = [g dz] [W; A^T]        dA = x^T dz        dB = z^T g

x and g come with room at the end of their rows, where z and dz are put in place (see low_rank). A and B are used in x's
dtype; their gradients are float32 sums.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.low_rank import contract_rows, project_into, room_for
from pallas_kernels.nf4.array import NF4Array, NF4Slice, check_packed
from pallas_kernels.nf4.dequantize import FLOATS
from pallas_kernels.nf4.products import PASSES, input_gradient, product, way_of


def nf4_matmul(
    x: Float[Array, "... in"],
    q: NF4Array,
    *,
    a: Float[Array, "in r"] | None = None,
    b: Float[Array, "r out"] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    implementation: str | None = None,
) -> Float[Array, "... out"]:
    """x @ W^T, or x @ W^T + scale (x @ a) @ b, in x's dtype, accumulated in float32; differentiable in x, a and b.

    Args:
        x: float32 (then multiplied as such, never as tf32), bfloat16 or float16 [..., in].
        q: one packed matrix [out, in], unpacked to x's dtype. Of a stack, scan over or index the leaves.
        a, b: LoRA's factors, both or neither, used in x's dtype; their gradients are float32 sums.
        implementation: "mosaic" (decode in registers, on Hopper; `out` a multiple of 128; the backward pass unpacks), "triton"
            (decode in registers; both take 16-bit x, and `in` a multiple of 64) or "xla" (unpack, then a dense product).

    Works on shards: of rows (dx is then a partial sum) or of columns (y is). A shard_map that checks what varies along
    which axis wants x marked as varying along those that shard q (`jax.lax.pcast`).
    """
    check_packed("nf4_matmul", q)
    if q.ndim != 2:
        raise ValueError(f"nf4_matmul takes one matrix [out, in], but {q.shape=} is a stack; scan over it.")
    if x.ndim == 0 or x.shape[-1] != q.shape[-1]:
        raise ValueError(f"nf4_matmul needs x [..., in] for a weight [out, in], but {x.shape=} and {q.shape=}.")
    if x.dtype not in FLOATS:
        raise TypeError(f"nf4_matmul takes float32, bfloat16 or float16, not {x.dtype=}; convert it.")
    chosen = ways(x, q, implementation)
    if a is None and b is None:
        return _matmul(chosen, x, q) if x.size else _of_no_rows(x, q)
    if a is None or b is None or (a.shape[:1], b.shape[1:], a.shape[1:]) != (q.shape[1:], q.shape[:1], b.shape[:1]):
        factors = [None if each is None else each.shape for each in (a, b)]
        raise ValueError(f"nf4_matmul needs a [in, r] and b [r, out] for {q.shape=}, but they are {factors}.")
    if not x.size:
        return _of_no_rows(x, q)
    return _matmul_beside(chosen, x, q, a, b, jnp.asarray(scale, jnp.float32))


def _of_no_rows(x: jax.Array, q: NF4Array) -> jax.Array:
    """What a batch without rows comes to, of which kernels launch nothing and order nothing after it."""
    return jnp.zeros((*x.shape[:-1], q.shape[0]), x.dtype)


def ways(x: jax.Array, q: NF4Array, implementation: str | None = None) -> tuple[str, str]:
    """The implementations of the forward pass and of the input gradient."""
    rows: Any = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    forward, backward = (way_of(which, rows, [_one(q)], implementation) for which in PASSES)
    return forward, backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(ways: tuple[str, str], x: jax.Array, q: NF4Array) -> jax.Array:
    return product(_rows(x), [_one(q)], way=ways[0]).reshape(*x.shape[:-1], -1)


def _forward(ways: tuple[str, str], x: jax.Array, q: NF4Array) -> tuple[jax.Array, NF4Array]:
    return _matmul(ways, x, q), q


def _backward(ways: tuple[str, str], q: NF4Array, g: jax.Array) -> tuple[jax.Array, None]:
    return input_gradient(_rows(g), [_one(q)], way=ways[1]).reshape(*g.shape[:-1], -1), None


_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_beside(
    ways: tuple[str, str], x: jax.Array, q: NF4Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> jax.Array:
    return _forward_beside(ways, x, q, a, b, scale)[0]


def _forward_beside(
    ways: tuple[str, str], x: jax.Array, q: NF4Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple]:
    inner, rank = a.shape
    rows = project_into(_rows(x, room_for(rank)), a.astype(x.dtype), jnp.broadcast_to(scale, rank))
    y = product(rows, [_one(q)], b.T.astype(x.dtype), way=ways[0])
    return y.reshape(*x.shape[:-1], -1), (x, rows[:, inner : inner + rank], q, a, b, scale)


def _backward_beside(ways: tuple[str, str], saved: tuple, g: jax.Array) -> tuple:
    x, z, q, a, b, scale = saved
    rank, outer = b.shape
    rows = project_into(_rows(g, room_for(rank)), b.T.astype(g.dtype), jnp.broadcast_to(scale, rank))
    dx = input_gradient(rows, [_one(q)], a.T.astype(g.dtype), way=ways[1])
    db = contract_rows(z, rows, rank=rank, columns=outer)
    da = contract_rows(rows, _rows(x), rank=rank, start=outer).T
    return dx.reshape(x.shape), None, da.astype(a.dtype), db.astype(b.dtype), jnp.zeros_like(scale)


_matmul_beside.defvjp(_forward_beside, _backward_beside)


def _rows(x: jax.Array, room: int = 0) -> jax.Array:
    return jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, room)))


def _one(q: NF4Array) -> NF4Slice:
    return NF4Slice(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], q), jnp.int32(0))
