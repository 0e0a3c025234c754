"""Attention of new positions to all that a key/value cache holds, each row of the batch as long as it is.

Query t of row b stands at position p = lengths[b] + t, and its own key is in the cache already. It sees the keys at
positions 0 to p, or the last `sliding_window` of them:

    o_bt = sum_s softmax_s(scale q_bt . k_bs) v_bs        over the s it sees

The G = N / K query heads of a key head are multiplied together, so that a key is read once for all of them. Products are
accumulated in float32, where the softmax is computed; its weights are rounded to v's dtype, as in flash_attention.

Few rows would leave most of a GPU idle, so the kernel cuts a row's positions into P pieces, each a softmax of its own:

    o = sum_p w_p o_p        w = softmax_p(lse_p)

It reads what rows hold and no more, where XLA reads the whole capacity, twice.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.triton_call import triton_call, triton_obstacle

BLOCK = 64  # positions a program takes at a time
LEAST_SPAN = 128  # fewer in a piece are not worth a program
PROGRAMS = 528  # four for each of an H200's multiprocessors


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
        implementation: "triton" (one new position, 16-bit) or "xla".
    """
    chosen = choose_implementation("decode_attention", implementation, {"triton": _obstacle(q), "xla": None})
    batch, new, heads, dim = q.shape
    if k.shape != v.shape or k.ndim != 4 or (k.shape[0], k.shape[3]) != (batch, dim) or heads % k.shape[1]:
        raise ValueError(
            f"decode_attention needs q [B, T, N, D] and k, v [B, K, C, D] with K dividing N, but {q.shape=}, {k.shape=},"
            f" {v.shape=}."
        )
    if lengths.shape != (batch,):
        raise ValueError(f"decode_attention needs one length a row, [{batch}], but {lengths.shape=}.")
    kv_heads, capacity = k.shape[1], k.shape[2]
    factor = float(dim**-0.5 if scale is None else scale)
    if chosen == "triton":
        return _in_pieces(q[:, 0], k, v, lengths, factor, sliding_window)[:, None]
    group = heads // kv_heads
    rows = q.reshape(batch, new, kv_heads, group, dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    logits = _product("bkrd,bkcd->bkrc", rows, k)
    position = lengths[:, None, None] + (jnp.arange(new * group, dtype=lengths.dtype) // group)[None, :, None]
    place = jnp.arange(capacity, dtype=lengths.dtype)[None, None, :]
    seen = place <= position
    if sliding_window is not None:
        seen &= place > position - sliding_window
    logits *= factor
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    # what a cache holds past a row's end may be anything; a weight of 0 would not undo a NaN
    values = jnp.where((place <= position[:, -1:])[:, 0, None, :, None], v, jnp.zeros((), v.dtype))
    out = _product("bkrc,bkcd->bkrd", weights.astype(v.dtype), values).reshape(batch, kv_heads, new, group, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _obstacle(q: jax.Array) -> str | None:
    """Why the kernel cannot serve this call, None where it can."""
    if q.shape[1] != 1:
        return f"it takes one new position a row, not {q.shape[1]}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q.dtype}"
    return triton_obstacle()


def _in_pieces(
    q: Float[Array, "B N D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    lengths: Int[Array, "B"],
    scale: float,
    window: int | None,
) -> Float[Array, "B N D"]:
    from pallas_kernels.decode_attention.triton_kernels import decode_kernel

    sizes = launch_sizes(q.shape, k.shape, scale, window)
    pieces, rows = -(-k.shape[2] // sizes["SPAN"]), q.shape[0] * k.shape[1]
    parts, lse = triton_call(
        decode_kernel,
        q,
        k,
        v,
        lengths,
        out=(
            jax.ShapeDtypeStruct((pieces, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((pieces, *q.shape[:2]), jnp.float32),
        ),
        grid=(rows, pieces),
        num_warps=4,
        num_stages=2,
        **sizes,
    )
    weights = jax.nn.softmax(lse, axis=0)
    return jnp.sum(weights[..., None] * parts, axis=0).astype(q.dtype)


def launch_sizes(q: tuple[int, ...], k: tuple[int, ...], scale: float, window: int | None) -> dict[str, Any]:
    """The kernel's constants for q [B, N, D] and k [B, K, C, D]: pieces so many that a large GPU is full."""
    batch, heads, dim = q
    _, kv_heads, capacity, _ = k
    wanted = max(1, PROGRAMS // (batch * kv_heads))
    return {
        "FACTOR": scale * math.log2(math.e),
        "WINDOW": window or 0,
        "BATCH": batch,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "CAPACITY": capacity,
        "SPAN": max(LEAST_SPAN, -(-capacity // wanted // BLOCK) * BLOCK),
        "D": dim,
        "DP": 1 << (dim - 1).bit_length(),
        "GP": max(16, 1 << (heads // kv_heads - 1).bit_length()),
        "BN": BLOCK,
    }


def _product(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In float32."""
    return jnp.einsum(pattern, x, y, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)
