"""Grouped-query attention with causal order, packed documents, a sliding window, capped logits and dropout.

For query i and the keys j visible to it, per head and with scale a and cap c (no cap: t = a q.k):

    t_ij = c tanh(a q_i.k_j / c)          lse_i = log sum_j exp t_ij
    p_ij = exp(t_ij - lse_i)              o_i = sum_j z_ij p_ij v_j

z is 1, or with dropout of rate r either 0 or 1 / (1 - r), a hash of seed, head, i and j (`dropout.py`). With cotangents
g_i of o_i and l_i of lse_i, from dp_ij/dt_ik = p_ij (delta_jk - p_ik) and sum_j p_ij z_ij g_i.v_j = g_i.o_i:

    dv_j = sum_i z_ij p_ij g_i     dt_ij = p_ij (z_ij g_i.v_j - g_i.o_i + l_i)     ds_ij = dt_ij (1 - t_ij^2 / c^2)
    dq_i = a sum_j ds_ij k_j       dk_j = a sum_i ds_ij q_i

Saved: q, k, v, o and lse; p is made again from them. Visible are keys of the query's own segment, at or before it when
causal, less than `sliding_window` places back. Segment 0 is padding. A query that sees no key has output, log-sum-exp and
gradients of zero. Metadata of segments may say that keys are other tokens than the queries (`segment_metadata`): attention
to many keys is put together from such parts.

Implementations, each a file: `mosaic`, for Hopper, and `triton` keep p in registers and visit only blocks that hold a
visible pair; `mosaic` takes all but dropout, `triton` takes every option. `cudnn` is NVIDIA's fused kernel, which does
less and reads segments as a mask. `xla` writes the lines above in jnp, p whole in memory, for any device and dtype. The
passes share only lse, so a Mosaic forward pass may be followed by another's backward pass (`_after_mosaic`). But for
cuDNN's backward pass nothing is added atomically: two runs give the same bits.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.flash_attention import cudnn, mosaic, mosaic_backward, triton, xla
from pallas_kernels.flash_attention.mosaic_common import obstacle as mosaic_obstacle
from pallas_kernels.flash_attention.options import Ids, Options, check_arrays
from pallas_kernels.flash_attention.segments import KEYS, QUERIES, SegmentMetadata, segment_metadata
from pallas_kernels.tuning import choice

LONG = 4096  # positions of a row from which cuDNN's five matrix products beat our seven, where nothing was measured
Segments = SegmentMetadata | jax.Array | None


def flash_attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | SegmentMetadata | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Int[Array, ""] | int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B S N D"] | tuple[Float[Array, "B S N D"], Float[Array, "B N S"]]:
    """softmax(scale q k^T) v over the visible keys, in q's dtype; N query heads share K key/value heads.

    Query i sees key j when j <= i by index in the row (`causal`), i - j < `sliding_window`, and both have the same
    segment id; id 0 is padding, whose outputs are zero. Layers that share a batch share `segment_metadata(segment_ids)`.
    `scale` is D^-1/2 unless given; `soft_cap` bounds the logits to (-soft_cap, soft_cap). `dropout_rate` of the weights
    become 0, which ones `dropout_seed` says. `deterministic` keeps to kernels that give the same gradients every time: cuDNN's,
    faster on long rows, need not. With `return_lse` also the log of each query's sum of exponentials in
    float32, 0 for padding.
    """
    options = _options(q, causal, sliding_window, soft_cap, scale, dropout_rate, deterministic)
    seed = _seed(dropout_seed, options)
    name, segments = _prepare(q, k, v, segment_ids, options, return_lse, implementation)
    outputs = cast(tuple[jax.Array, jax.Array], _attention(q, k, v, segments, seed, options, name, return_lse))
    return outputs if return_lse else outputs[0]


@dataclass(frozen=True)
class AfterMosaic:
    """Whose backward pass follows a Mosaic forward pass where both are able."""

    implementation: str

    def __post_init__(self) -> None:
        if self.implementation not in ("cudnn", "mosaic"):
            raise ValueError(f"{self.implementation=} must be cudnn or mosaic.")


@partial(jax.tree_util.register_dataclass, meta_fields=("options", "name"), data_fields=("arrays",))
@dataclass(frozen=True)
class AttentionSaved:
    """What `attention_backward` needs: q, k, v, segments, dropout's seed, o and log-sum-exp; what ran, and with what."""

    arrays: tuple
    options: Options
    name: str

    @property
    def out(self) -> Float[Array, "B S N D"]:
        return self.arrays[5]

    @property
    def lse(self) -> Float[Array, "B N S"]:
        return self.arrays[6]


def attention_forward(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | SegmentMetadata | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Int[Array, ""] | int | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S N D"], AttentionSaved]:
    """`flash_attention` with these options, for a backward pass written by hand."""
    options = _options(q, causal, sliding_window, soft_cap, scale, dropout_rate, deterministic)
    name, segments = _prepare(q, k, v, segment_ids, options, False, implementation)
    seed = _seed(dropout_seed, options)
    out, lse = _forward(q, k, v, segments, seed, options, name)
    return out, AttentionSaved((q, k, v, segments, seed, out, lse), options, name)


def attention_known(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    out: Float[Array, "B S N D"],
    lse: Float[Array, "B N S"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B S"] | SegmentMetadata | None = None,
) -> AttentionSaved:
    """What `attention_forward` saved when it made `out` and `lse` of the same arguments."""
    options = _options(q, causal, None, None, None, 0.0, False)
    name, segments = _prepare(q, k, v, segment_ids, options, False, None)
    return AttentionSaved((q, k, v, segments, None, out, lse), options, name)


def attention_backward(
    saved: AttentionSaved, g: Float[Array, "B S N D"]
) -> tuple[Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """(dq, dk, dv) for cotangents g of the output."""
    q, k, v, segments, seed, out, lse = saved.arrays
    return _backward(q, k, v, segments, seed, out, lse, g, None, saved.options, saved.name)


def attention_part_backward(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    out: Float[Array, "B S N D"],
    lse: Float[Array, "B N S"],
    g: Float[Array, "B S N D"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B S"] | SegmentMetadata | None = None,
) -> tuple[Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """(dq, dk, dv) of pairs with these keys, of several sets that the queries see: `out` and `lse` are over all sets.

    The sum over the sets is the gradient of the queries.
    """
    options = Options(causal, None, None, q.shape[-1] ** -0.5)
    name, segments = _prepare(q, k, v, segment_ids, options, False, None)
    return _backward(q, k, v, segments, None, out, lse, g, None, options, name)


def _options(
    q: jax.Array,
    causal: bool,
    window: int | None,
    cap: float | None,
    scale: float | None,
    rate: float,
    deterministic: bool,
) -> Options:
    depth = math.prod(q.shape[-1:])  # 0 is refused where shapes are
    factor = (depth or 1) ** -0.5 if scale is None else float(scale)
    return Options(causal, window, cap, factor, rate, deterministic)


def _seed(seed: jax.Array | int | None, options: Options) -> jax.Array | None:
    if not options.dropout_rate:
        return None
    if seed is None:
        raise ValueError(f"dropout_rate={options.dropout_rate} needs a dropout_seed, an integer new in each step.")
    if jnp.ndim(seed) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"dropout_seed must be one integer, not {seed}.")
    return jnp.asarray(seed, jnp.int32)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    options: Options,
    return_lse: bool,
    implementation: str | None,
) -> tuple[str, Segments]:
    """The implementation that runs, and segments as it wants them."""
    ids = _ids(segments, q)
    check_arrays(q, k, v, ids)
    obstacles = {
        "mosaic": mosaic_obstacle(q, options),
        "cudnn": cudnn.obstacle(q, ids, options, return_lse),
        "triton": triton.obstacle(q, options),
        "xla": None,
    }
    if ids is not None:  # cuDNN would visit every block and read a mask
        obstacles = {name: obstacles[name] for name in ("mosaic", "triton", "cudnn", "xla")}
    name = choose_implementation("flash_attention", implementation, obstacles)
    if name in ("mosaic", "triton") and segments is not None and not isinstance(segments, SegmentMetadata):
        segments = segment_metadata(segments)
    return name, segments


def _ids(segments: Segments, q: jax.Array) -> Ids:
    """Without the padding that the kernels want."""
    if isinstance(segments, SegmentMetadata):
        ids = segments.ids[:, :, : q.shape[1]]
        return ids[:, QUERIES], ids[:, KEYS]
    return None if segments is None else (segments, segments)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    seed: jax.Array | None,
    options: Options,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    if name == "mosaic":
        assert not isinstance(segments, jax.Array)
        return mosaic.forward(q, k, v, segments, options)
    if name == "triton":
        assert not isinstance(segments, jax.Array)
        return triton.forward(q, k, v, segments, seed, options)
    if name == "cudnn":
        return cudnn.forward(q, k, v, _ids(segments, q), options)
    return xla.forward(q, k, v, _ids(segments, q), seed, options)


def _after_mosaic(q: jax.Array, ids: Ids, options: Options, of_lse: bool) -> str:
    """What makes the gradients after a Mosaic forward pass."""
    by_cudnn = cudnn.obstacle(q, ids, options, of_lse) is None
    fits = q.shape[3] in mosaic_backward.QUERIES_TILES
    if by_cudnn and ids is None and not fits:
        return "cudnn"
    if by_cudnn and ids is None:
        length = 1 << (q.shape[1].bit_length() - 1)  # one choice from a power of two to the next
        default = AfterMosaic("cudnn" if q.shape[1] >= LONG else "mosaic")
        return choice("flash_attention.after_mosaic", default, depth=q.shape[3], length=length).implementation
    if fits:
        return "mosaic"
    return "triton" if triton.obstacle(q, options) is None else "cudnn" if by_cudnn else "xla"


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    seed: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    options: Options,
    name: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if name == "mosaic":
        name = _after_mosaic(q, _ids(segments, q), options, dlse is not None)
    if name == "cudnn":
        return cudnn.backward(q, k, v, _ids(segments, q), out, lse, dout, options)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    if dlse is not None:
        delta -= dlse
    if name == "mosaic":
        assert not isinstance(segments, jax.Array)
        return mosaic_backward.backward(q, k, v, segments, lse, delta, dout, options)
    if name == "triton":
        assert not isinstance(segments, jax.Array)
        return triton.backward(q, k, v, segments, seed, lse, delta, dout, options)
    return xla.backward(q, k, v, _ids(segments, q), seed, lse, delta, dout, options)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    seed: jax.Array | None,
    options: Options,
    name: str,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, segments, seed, options, name)


def _attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    seed: jax.Array | None,
    options: Options,
    name: str,
    return_lse: bool,
) -> tuple:
    out, lse = _forward(q, k, v, segments, seed, options, name)
    return (out, lse), (q, k, v, segments, seed, out, lse)


def _attention_backward(
    options: Options, name: str, return_lse: bool, saved: tuple, cotangents: tuple[jax.Array, jax.Array]
) -> tuple:
    (q, k, v, segments, seed, out, lse), (g, g_lse) = saved, cotangents
    return *_backward(q, k, v, segments, seed, out, lse, g, g_lse if return_lse else None, options, name), None, None


_attention.defvjp(_attention_forward, _attention_backward)
