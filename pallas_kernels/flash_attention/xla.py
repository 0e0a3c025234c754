"""Attention in plain jnp: the reference in the dtype of its arguments, and the implementation for any device.

`forward` and `backward` make the sums of `op.py` in float32 with matrix products on operands of the inputs' dtype, the
weights p whole in memory. Heads that share a key/value head are an axis of their own ("k g", query head = k G + g): k
and v are never repeated in memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import exact_precision
from pallas_kernels.flash_attention.dropout import kept, rate_of
from pallas_kernels.flash_attention.options import Ids, Options


def flash_attention_reference(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"] | None,
    options: Options,
    dropout_seed: Int[Array, ""] | None = None,
    key_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B S N D"], Float[Array, "B N S"]]:
    """The math in the dtype of its arguments: output and log-sum-exp."""
    ids = None if segment_ids is None else (segment_ids, segment_ids if key_ids is None else key_ids)
    heads = q.shape[2] // k.shape[2]
    logits = options.scale * jnp.einsum("bqnd,bsnd->bnqs", q, jnp.repeat(k, heads, axis=2))
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    seen, blind = visible(q.shape[1], ids, options)
    logits = jnp.where((seen | blind)[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    if options.dropout_rate:
        weights = jnp.where(_kept(q, dropout_seed, options), weights / (1 - rate_of(options.dropout_rate)), 0)
    out = jnp.einsum("bnqs,bsnd->bqnd", weights, jnp.repeat(v, heads, axis=2))
    return without_blind(out, lse, blind)


def visible(length: int, ids: Ids, options: Options) -> tuple[jax.Array, jax.Array]:
    """Whether the query (second axis) sees the key (last axis), bool [B or 1, S, S]; whether it sees none, [B or 1, S, 1].

    Where a softmax is made, a query without keys is given all: its results are finite and then set to zero.
    """
    index = jnp.arange(length)
    distance = (index[:, None] - index[None, :])[None]
    seen = distance >= 0 if options.causal else jnp.ones_like(distance, bool)
    if options.sliding_window is not None:
        seen &= distance < options.sliding_window
    if ids is not None:
        queries, keys = ids
        seen = seen & (queries[:, :, None] == keys[:, None, :]) & (queries != 0)[:, :, None]
    return seen, ~seen.any(axis=-1, keepdims=True)


def without_blind(out: jax.Array, lse: jax.Array, blind: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zero [B, S, N, D] and [B, N, S] where the query sees no key."""
    return jnp.where(blind[..., None], 0, out), jnp.where(blind.swapaxes(1, 2), 0, lse)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids, seed: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    """o [B, S, N, D] and lse [B, N, S]."""
    seen, blind = visible(q.shape[1], ids, options)
    logits = jnp.where((seen | blind)[:, None, None], _logits(q, k, options), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = _dropped(jnp.exp(logits - lse[..., None]), q, seed, options).astype(v.dtype)
    out = _einsum("bkgqs,bskd->bqkgd", p, v).astype(q.dtype)
    lse = lse.reshape(q.shape[0], q.shape[2], q.shape[1])
    return without_blind(out.reshape(q.shape), lse, blind)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Ids,
    seed: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv; delta [B, N, S] is o.g less lse's cotangent."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]

    def per_row(x: jax.Array) -> jax.Array:
        return x.reshape(batch, kv_heads, heads // kv_heads, length, 1)

    seen, _ = visible(length, ids, options)
    logits = _logits(q, k, options)
    p = jnp.where(seen[:, None, None], jnp.exp(logits - per_row(lse)), 0)
    dout = _grouped(dout, kv_heads)
    dp = _dropped(_einsum("bqkgd,bskd->bkgqs", dout, v), q, seed, options)
    ds = p * (dp - per_row(delta))
    if options.soft_cap is not None:
        ds *= 1 - (logits / options.soft_cap) ** 2
    ds = ds.astype(q.dtype)
    dq = options.scale * _einsum("bkgqs,bskd->bqkgd", ds, k)
    dk = options.scale * _einsum("bkgqs,bqkgd->bskd", ds, _grouped(q, kv_heads))
    dv = _einsum("bkgqs,bqkgd->bskd", _dropped(p, q, seed, options).astype(v.dtype), dout)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _einsum(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, x, y, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, N, D] -> [B, S, K, N / K, D]."""
    batch, length, _, depth = x.shape
    return x.reshape(batch, length, kv_heads, -1, depth)


def _logits(q: jax.Array, k: jax.Array, options: Options) -> jax.Array:
    """t [B, K, G, Q, S] in float32, not masked."""
    logits = options.scale * _einsum("bqkgd,bskd->bkgqs", _grouped(q, k.shape[2]), k)
    return logits if options.soft_cap is None else options.soft_cap * jnp.tanh(logits / options.soft_cap)


def _kept(q: jax.Array, seed: jax.Array | None, options: Options) -> jax.Array:
    assert seed is not None
    return kept(seed, q.shape[0], q.shape[2], q.shape[1], options.dropout_rate)


def _dropped(p: jax.Array, q: jax.Array, seed: jax.Array | None, options: Options) -> jax.Array:
    """p [B, K, G, Q, S] after dropout."""
    if not options.dropout_rate:
        return p
    return jnp.where(_kept(q, seed, options).reshape(p.shape), p / (1 - rate_of(options.dropout_rate)), 0)
