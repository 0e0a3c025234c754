"""The turn of q and k inside a packed q/k/v product, split in the same pass, and its backward; without derivatives.

For backward passes written by hand: a row of the product holds N query heads, then K key and K value heads. Its gradient
may be made with room at the end of each row for a matrix product's extra operands (see low_rank).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.rope.op import _apply_rope
from pallas_kernels.triton_call import triton_call, triton_obstacle

WARPS = 4


def rope_qkv(
    qkv: Float[Array, "T (N+2K)*D"],
    cos: Float[Array, "B S D/2"],
    sin: Float[Array, "B S D/2"],
    heads: int,
    kv_heads: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """(q, k, v), q and k turned; T = B S."""
    batch, length, half = cos.shape
    if _choose(implementation) == "xla":
        x = qkv.reshape(batch, length, heads + 2 * kv_heads, 2 * half)
        q, k, v = jnp.split(x, [heads, heads + kv_heads], axis=2)
        return _apply_rope(q, cos, sin), _apply_rope(k, cos, sin), v
    from pallas_kernels.rope.triton_kernels import split_kernel

    out = [jax.ShapeDtypeStruct((batch, length, count, 2 * half), qkv.dtype) for count in (heads, kv_heads, kv_heads)]
    return triton_call(
        split_kernel,
        qkv,
        cos,
        sin,
        out=tuple(out),
        grid=(batch * length,),
        num_warps=WARPS,
        STRIDE=qkv.shape[1],
        **_sizes(heads, kv_heads, half),
    )


def rope_qkv_backward(
    dq: Float[Array, "B S N D"],
    dk: Float[Array, "B S K D"],
    dv: Float[Array, "B S K D"],
    cos: Float[Array, "B S D/2"],
    sin: Float[Array, "B S D/2"],
    *,
    room: int = 0,
    implementation: str | None = None,
) -> Float[Array, "T (N+2K)*D+room"]:
    """The product's gradient: dq and dk turned back, side by side with dv."""
    batch, length, heads, depth = dq.shape
    kv_heads = dk.shape[2]
    width = (heads + 2 * kv_heads) * depth
    if _choose(implementation) == "xla":
        joined = jnp.concatenate([_apply_rope(dq, cos, -sin), _apply_rope(dk, cos, -sin), dv], axis=2)
        return jnp.pad(joined.reshape(batch * length, width), ((0, 0), (0, room)))
    from pallas_kernels.rope.triton_kernels import join_kernel

    return triton_call(
        join_kernel,
        dq,
        dk,
        dv,
        cos,
        sin,
        out=jax.ShapeDtypeStruct((batch * length, width + room), dq.dtype),
        grid=(batch * length,),
        num_warps=WARPS,
        STRIDE=width + room,
        **_sizes(heads, kv_heads, depth // 2),
    )


def _sizes(heads: int, kv_heads: int, half: int) -> dict[str, Any]:
    def padded(size: int) -> int:
        return 1 << (size - 1).bit_length()

    return {
        "Q": heads,
        "K": kv_heads,
        "Q_PADDED": padded(heads),
        "K_PADDED": padded(kv_heads),
        "HALF": half,
        "WIDTH": padded(half),
    }


def _choose(implementation: str | None) -> str:
    return choose_implementation("rope_qkv", implementation, {"triton": triton_obstacle(), "xla": None})
