"""Grouped-query attention with causal order, packed documents, a sliding window and capped logits.

For query i and the keys j visible to it, per head and with scale a and cap c (no cap: t = a q.k):

    t_ij = c tanh(a q_i.k_j / c)          lse_i = log sum_j exp t_ij
    p_ij = exp(t_ij - lse_i)              o_i = sum_j p_ij v_j

With cotangents g_i of o_i and l_i of lse_i, from dp_ij/dt_ik = p_ij (delta_jk - p_ik):

    dv_j = sum_i p_ij g_i          dt_ij = p_ij (g_i.v_j - g_i.o_i + l_i)          ds_ij = dt_ij (1 - t_ij^2 / c^2)
    dq_i = a sum_j ds_ij k_j       dk_j = a sum_i ds_ij q_i

Saved: q, k, v, o and lse; p is made again from them. Visible are keys of the query's own segment, at or before it when
causal, less than `sliding_window` places back. Segment 0 is padding: it attends to itself, so that no row is ever empty
and nothing divides 0 by 0, and its outputs and gradients are then set to zero. Heads that share a key/value head are an
axis of their own ("k g" below, query head = k * G + g): k and v are never repeated in memory.

Implementations: `cudnn`, NVIDIA's fused kernel through jax.nn, which brings a backward pass of its own and keeps p out
of memory; `xla`, the lines above in float32, matrix products on operands of the inputs' dtype, p whole in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, cuda_capability, exact_precision


@dataclass(frozen=True)
class Options:
    """All of a call that is not an array."""

    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    scale: float


def flash_attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B S N D"] | tuple[Float[Array, "B S N D"], Float[Array, "B N S"]]:
    """softmax(scale q k^T) v over the visible keys, in q's dtype; N query heads share K key/value heads.

    Query i sees key j when j <= i by index in the row (`causal`), i - j < `sliding_window`, and both have the same
    segment id; id 0 is padding, whose outputs are zero. `scale` is D^-1/2 unless given; `soft_cap` bounds the logits to
    (-soft_cap, soft_cap). With `return_lse` also the log of each query's sum of exponentials in float32, 0 for padding.
    """
    options = Options(causal, sliding_window, soft_cap, q.shape[-1] ** -0.5 if scale is None else float(scale))
    _check(q, k, v, segment_ids, options)
    obstacles = {"cudnn": _cudnn_obstacle(q, segment_ids, soft_cap, return_lse), "xla": None}
    if choose_implementation("flash_attention", implementation, obstacles) == "cudnn":
        return _cudnn_attention(q, k, v, segment_ids, options)
    out, lse = _xla_attention(q, k, v, segment_ids, options)
    return (out, lse) if return_lse else out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionSaved:
    """What `attention_backward` needs: q, k, v, o and log-sum-exp, as the implementation that ran keeps them."""

    residuals: Callable


def attention_forward(
    q: Float[Array, "B S N D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], **options: Any
) -> tuple[Float[Array, "B S N D"], AttentionSaved]:
    """`flash_attention` with these options, for a backward pass written by hand."""
    out, residuals = jax.vjp(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v)
    return out, AttentionSaved(residuals)


def attention_backward(saved: AttentionSaved, g: Float[Array, "B S N D"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) for cotangents g of the output."""
    return saved.residuals(g)


def flash_attention_reference(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"] | None,
    options: Options,
) -> tuple[Float[Array, "B S N D"], Float[Array, "B N S"]]:
    """The same math in the dtype of its arguments: output and log-sum-exp."""
    heads = q.shape[2] // k.shape[2]
    logits = options.scale * jnp.einsum("bqnd,bsnd->bnqs", q, jnp.repeat(k, heads, axis=2))
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    logits = jnp.where(_visible(q.shape[1], segment_ids, options)[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnqs,bsnd->bqnd", jnp.exp(logits - lse[..., None]), jnp.repeat(v, heads, axis=2))
    return _without_padding(out, lse, segment_ids)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, options: Options) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{q.shape=}, {k.shape=}, {v.shape=} must be [B, S, N, D], [B, S, K, D] and [B, S, K, D].")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be the same; cast before the call.")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} positions and k {k.shape[1]}: they must be equal, the same tokens.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads.")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(f"{segment_ids.shape=} must be {q.shape[:2]}, one id per position.")
    if options.sliding_window is not None and (options.sliding_window < 1 or not options.causal):
        raise ValueError(f"{options.sliding_window=} must be at least 1 and needs causal=True, not {options.causal}.")
    if options.soft_cap is not None and options.soft_cap <= 0:
        raise ValueError(f"{options.soft_cap=} must be positive; use None for no cap.")


def _visible(length: int, segment_ids: jax.Array | None, options: Options) -> jax.Array:
    """Whether the query (second axis) sees the key (last axis), bool [B or 1, S, S]; always true on the diagonal."""
    index = jnp.arange(length)
    distance = (index[:, None] - index[None, :])[None]
    visible = distance >= 0 if options.causal else jnp.ones_like(distance, bool)
    if options.sliding_window is not None:
        visible &= distance < options.sliding_window
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return visible


def _without_padding(out: jax.Array, lse: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Zero [B, S, N, D] and [B, N, S] where the position is padding."""
    if segment_ids is None:
        return out, lse
    real = segment_ids != 0
    return jnp.where(real[:, :, None, None], out, 0), jnp.where(real[:, None, :], lse, 0)


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


def _xla_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    """o [B, S, N, D] and lse [B, N, S], padding not yet zeroed."""
    visible = _visible(q.shape[1], segment_ids, options)[:, None, None]
    logits = jnp.where(visible, _logits(q, k, options), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - lse[..., None]).astype(v.dtype)
    out = _einsum("bkgqs,bskd->bqkgd", p, v).astype(q.dtype)
    return out.reshape(q.shape), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    return _without_padding(*_xla_forward(q, k, v, segment_ids, options), segment_ids)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, options: Options) -> tuple:
    out, lse = _xla_forward(q, k, v, segment_ids, options)
    outputs = _without_padding(out, lse, segment_ids)
    # padding keeps its own lse, so that its p does not overflow; o is the one the caller holds, to share its memory
    return outputs, (q, k, v, segment_ids, outputs[0], lse)


def _backward(options: Options, saved: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    q, k, v, segment_ids, out, lse = saved
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    dout, dlse = _without_padding(*cotangents, segment_ids)

    def per_row(x: jax.Array) -> jax.Array:
        return x.reshape(batch, kv_heads, heads // kv_heads, length, 1)

    logits = _logits(q, k, options)
    p = jnp.exp(logits - per_row(lse))
    p = jnp.where(_visible(length, segment_ids, options)[:, None, None], p, 0)
    along = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    dout = _grouped(dout, kv_heads)
    ds = p * (_einsum("bqkgd,bskd->bkgqs", dout, v) - per_row(along) + per_row(dlse))
    if options.soft_cap is not None:
        ds *= 1 - (logits / options.soft_cap) ** 2
    ds = ds.astype(q.dtype)
    dq = options.scale * _einsum("bkgqs,bskd->bqkgd", ds, k)
    dk = options.scale * _einsum("bkgqs,bqkgd->bskd", ds, _grouped(q, kv_heads))
    dv = _einsum("bkgqs,bqkgd->bskd", p.astype(v.dtype), dout)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_xla_attention = jax.custom_vjp(_xla, nondiff_argnums=(4,))
_xla_attention.defvjp(_forward, _backward)


def _cudnn_obstacle(
    q: jax.Array, segment_ids: jax.Array | None, soft_cap: float | None, return_lse: bool
) -> str | None:
    """Why cuDNN's kernel cannot serve this call, None where it can."""
    capability, (_, length, _, depth) = cuda_capability(), q.shape
    widest = 256 if capability and capability >= (9, 0) else 128
    if capability is None or capability < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or more as jax's default device"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 or bfloat16, not {q.dtype}"
    if soft_cap is not None:
        return f"it does not cap logits, and {soft_cap=}"
    if return_lse:
        return "it does not return the log-sum-exp that return_lse=True asks for"
    if depth % 8 or depth > widest:
        return f"head size {depth} is not a multiple of 8 up to {widest}"
    if segment_ids is not None and length % 2:
        return f"with segment_ids it needs an even number of positions, not {length}"
    return None


def _cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, options: Options
) -> jax.Array:
    """Segments go in as a mask [B, 1, S, S], and with them the window, as cuDNN takes either of the two alone."""
    window = options.sliding_window
    attend = partial(jax.nn.dot_product_attention, q, k, v, scale=options.scale, is_causal=options.causal)
    if segment_ids is None:
        return attend(local_window_size=None if window is None else (window - 1, 0), implementation="cudnn")
    out = attend(mask=_visible(q.shape[1], segment_ids, options)[:, None], implementation="cudnn")
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)
