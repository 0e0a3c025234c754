"""New positions turned, put into the cache, and attending to it: what a layer does between its products with q/k/v and o.

Where rows are short, or so many that a program for each row and key head fills a GPU, one launch does it all. Else new
keys and values are put into the cache first (turn_and_append), and decode_attention cuts rows into pieces.
"""

import math
from dataclasses import asdict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.op import LINES, Tiles, decode_attention
from pallas_kernels.decode_attention.stack import (
    KVStack,
    sizes_of,
    storage_obstacle,
    turn_and_append,
    written_in_place,
)
from pallas_kernels.decode_attention.work import Work
from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.triton_call import triton_obstacle
from pallas_kernels.tuning import choice

SHORT = 1024  # positions that one program goes through sooner than several and a merge do
MANY = 396  # rows times key heads that leave no multiprocessor idle


def append_and_attend(
    stack: KVStack,
    layer: Int[Array, ""],
    qkv: Float[Array, "T (N+2K)*D"],
    cos: Float[Array, "B S D/2"],
    sin: Float[Array, "B S D/2"],
    lengths: Int[Array, "B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S N D"], KVStack]:
    """The attention of packed q/k/v behind each row's positions, scaled by 1 / sqrt(D), and the stack with k and v. T = B S.

    implementation: "whole" (one launch, 16-bit queries) or "separate"; by default "whole" where it is the faster.
    """
    order = {"whole": _obstacle(stack, qkv, cos), "separate": None}
    if implementation is None and stack.capacity > SHORT and cos.shape[0] * stack.keys.shape[2] < MANY:
        implementation = "separate"
    if choose_implementation("append_and_attend", implementation, order) == "whole":
        return _whole(stack, layer, qkv, cos, sin, lengths)
    q, stack = turn_and_append(stack, layer, qkv, cos, sin, lengths)
    k_scales, v_scales = stack.key_scales, stack.value_scales
    o = decode_attention(q, stack.keys, stack.values, lengths, k_scales=k_scales, v_scales=v_scales, layer=layer)
    return o, stack


def _obstacle(stack: KVStack, qkv: jax.Array, cos: jax.Array) -> str | None:
    """Why one launch cannot do it here, or None."""
    lines = sizes_of(stack, qkv, cos).lines
    if lines > LINES:
        return f"it takes at most {LINES} queries of a key head, new positions times heads, not {lines}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {qkv.dtype}"
    return triton_obstacle() or storage_obstacle(stack.keys.dtype)


def tuned(stack: KVStack) -> Tiles:
    """Programs are as many as there are rows and key heads, whatever the tiles say."""
    return choice("append_and_attend.tiles", Tiles(64, warps=4, stages=2, programs=1), depth=stack.keys.shape[4])


def _whole(
    stack: KVStack, layer: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, KVStack]:
    from pallas_kernels.decode_attention.append_kernels import whole_kernel

    sizes, tiles = sizes_of(stack, qkv, cos), tuned(stack)
    factor = sizes.depth**-0.5 * math.log2(math.e)
    work = Work(**asdict(sizes), factor=factor, window=0, positions=tiles.positions, pieces=1, span=sizes.capacity)
    return written_in_place(
        whole_kernel,
        work,
        stack,
        layer,
        qkv,
        cos,
        sin,
        lengths,
        grid=(sizes.batch * sizes.kv_heads,),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
