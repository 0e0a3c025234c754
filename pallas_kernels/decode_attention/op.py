"""Attention of new positions to all that a key/value cache holds, each row of the batch as long as it is.

Query t of row b stands at position p = lengths[b] + t, and its own key is in the cache already. It sees the keys at
positions 0 to p, or the last `sliding_window` of them:

    o_bt = sum_s softmax_s(scale q_bt . k_bs) v_bs        over the s it sees

The G = N / K query heads of a key head are multiplied together, so that a key is read once for all of them. Products are
accumulated in float32, where the softmax is computed; its weights are rounded to v's dtype, as in flash_attention.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, exact_precision


def decode_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """The attention of `q` to a cache of capacity C; `lengths` are the positions that each row held before these.

    Args:
        scale: of the logits, 1 / sqrt(D) by default.
        sliding_window: how many positions a query sees, its own counted; None for all.
        implementation: "xla".
    """
    choose_implementation("decode_attention", implementation, {"xla": None})
    batch, new, heads, dim = q.shape
    if k.shape != v.shape or k.ndim != 4 or (k.shape[0], k.shape[3]) != (batch, dim) or heads % k.shape[1]:
        raise ValueError(
            f"decode_attention needs q [B, T, N, D] and k, v [B, K, C, D] with K dividing N, but {q.shape=}, {k.shape=},"
            f" {v.shape=}."
        )
    if lengths.shape != (batch,):
        raise ValueError(f"decode_attention needs one length a row, [{batch}], but {lengths.shape=}.")
    kv_heads, capacity = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = q.reshape(batch, new, kv_heads, group, dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    logits = _product("bkrd,bkcd->bkrc", rows, k)
    position = lengths[:, None, None] + (jnp.arange(new * group, dtype=lengths.dtype) // group)[None, :, None]
    place = jnp.arange(capacity, dtype=lengths.dtype)[None, None, :]
    seen = place <= position
    if sliding_window is not None:
        seen &= place > position - sliding_window
    logits *= dim**-0.5 if scale is None else scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    # what a cache holds past a row's end may be anything; a weight of 0 would not undo a NaN
    values = jnp.where((place <= position[:, -1:])[:, 0, None, :, None], v, jnp.zeros((), v.dtype))
    out = _product("bkrc,bkcd->bkrd", weights.astype(v.dtype), values).reshape(batch, kv_heads, new, group, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _product(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In float32."""
    return jnp.einsum(pattern, x, y, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)
