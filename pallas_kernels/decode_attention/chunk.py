"""Attention of many new positions, such as a part of a long prompt, to themselves and to what a cache held before them.

A row's T new positions attend to each other in causal order, and to its keys in the cache without any: both are calls of
`flash_attention`, of which the second takes the cache T positions at a time, as far as the longest row reaches. What they
find is joined by log-sum-exps (flash_attention.parts). Where a row's keys end within a piece, segments hide the rest; from
a row without new positions they hide all, and kernels skip it. The cache may hold the new positions already.

New keys and values are read as they come, those in the cache as they are stored; from 8 bits they are made whole first, a
piece at a time, and rounded to q's dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.stack import KVStack
from pallas_kernels.flash_attention import attention_forward, joined, known, segment_metadata


def chunk_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    stack: KVStack,
    layer: Int[Array, ""],
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """The attention of each row's first `counts` new positions, behind the `lengths` that the cache held of it.

    What comes out behind them may be anything. `implementation` is flash_attention's.
    """
    new = q.shape[1]
    if stack.capacity % new:
        raise ValueError(f"a cache of {stack.capacity} positions must be a multiple of the {new} new ones.")
    place = jnp.arange(new, dtype=lengths.dtype)[None]
    asks = place < counts[:, None]
    saved = attention_forward(q, k, v, causal=True, implementation=implementation)[1]

    def piece(index: Int[Array, ""], total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        there = place < lengths[:, None] - index * new
        keys, values = held(stack, layer, index * new, there, q.dtype)
        segments = segment_metadata(asks.astype(jnp.int32), there.astype(jnp.int32))
        found = attention_forward(q, keys, values, causal=False, segment_ids=segments, implementation=implementation)[1]
        return joined(total, (found.out, known(found.lse, asks & there[:, :1])))

    pieces = -(-jnp.max(jnp.where(counts > 0, lengths, 0)) // new)
    out, _ = jax.lax.fori_loop(0, pieces, piece, (saved.out.astype(jnp.float32), saved.lse))
    return out.astype(q.dtype)


def held(
    stack: KVStack, layer: Int[Array, ""], start: Int[Array, ""], there: Bool[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """A layer's keys and values from position `start` on, zero where a row has none."""
    rows, size = there.shape

    def cut(x: jax.Array) -> jax.Array:
        """[L, B, K, C, ...] -> [B, T, K, ...]."""
        sizes = (1, rows, x.shape[2], size, *x.shape[4:])
        corner = (layer, 0, 0, start, *[0] * (x.ndim - 4))
        return jax.lax.dynamic_slice(x, corner, sizes)[0].swapaxes(1, 2)

    def whole(codes: jax.Array, scales: jax.Array | None) -> jax.Array:
        values = cut(codes)
        if scales is not None:
            values = values.astype(jnp.float32) * cut(scales)[..., None]
        return jnp.where(there[..., None, None], values.astype(dtype), jnp.zeros((), dtype))

    pair = whole(stack.keys, stack.key_scales), whole(stack.values, stack.value_scales)
    # without it XLA folds the swap of axes into a product, which on a CPU it cannot do in bfloat16
    return jax.lax.optimization_barrier(pair)
