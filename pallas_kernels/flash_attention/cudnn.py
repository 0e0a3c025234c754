"""cuDNN's attention: forward through the function under jax.nn's, backward through the primitive under that.

jax.nn offers cuDNN's backward pass only to autodiff of its own forward pass. The primitive itself takes q, k, v, o, g
and the log-sum-exp, so it also serves a forward pass made by another kernel, and a backward pass written by hand.
Segments go in as a mask [B, 1, S, S], and with them the window, as cuDNN takes either of the two alone: it then visits
every block and reads a mask, which the other kernels do not.
"""

import inspect

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.flash_attention.options import Ids, Options
from pallas_kernels.flash_attention.xla import visible, without_blind

# jax 0.12 lets logits be changed by a function; the primitive wants to be told that none does
SCORE_MOD = {"score_mod": None} if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters else {}


def obstacle(q: jax.Array, ids: Ids, options: Options, return_lse: bool) -> str | None:
    """Why cuDNN's kernel cannot serve this call, None where it can."""
    capability, (_, length, _, depth) = cuda_capability(), q.shape
    widest = 256 if capability and capability >= (9, 0) else 128
    if capability is None or capability < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or more as jax's default device"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 or bfloat16, not {q.dtype}"
    if options.soft_cap is not None:
        return f"it does not cap logits, and soft_cap={options.soft_cap}"
    if options.deterministic:
        return "its backward pass adds in no fixed order, and deterministic=True"
    if options.dropout_rate:
        return f"its dropout is not this library's, and dropout_rate={options.dropout_rate}"
    if return_lse:
        return "its backward pass takes no gradient of the log-sum-exp that return_lse=True asks for"
    if depth % 8 or depth > widest:
        return f"head size {depth} is not a multiple of 8 up to {widest}"
    if length == 1:
        return "it does not differentiate attention of one position to itself"
    if ids is not None and length % 2:
        return f"with segment_ids it needs an even number of positions, not {length}"
    return None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids, options: Options) -> tuple[jax.Array, jax.Array]:
    """out [B, S, N, D] and lse [B, N, S]; jax.nn's own door would round the log-sum-exp to q's dtype."""
    mask_type, window, masks = _asked(q.shape[1], ids, options)
    mask = None if masks is None else (masks[0] | masks[1])[:, None]
    out, lse = cudnn.dot_product_attention(  # pyright: ignore[reportAssignmentType, reportGeneralTypeIssues]
        q, k, v, mask=mask, scale=options.scale, mask_type=mask_type, sliding_window_length=window, return_residual=True
    )
    return (out, lse) if masks is None else without_blind(out, lse, masks[1])


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Ids,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv. lse is masked with the cotangent where there is padding."""
    unused = jnp.zeros(0, q.dtype)
    mask_type, window, masks = _asked(q.shape[1], ids, options)
    bias = unused
    if ids is not None and masks is not None:
        bias = cudnn.combine_bias_and_mask(None, masks[0][:, None], q.dtype)
        # a padded row's weights are exp(t - lse): none with a log-sum-exp this large
        lse = jnp.where((ids[0] != 0)[:, None, :], lse, 1e30)
    gradients = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, bias, *[unused] * 6, lse, out, dout,
        scale=options.scale, seed=42, dropout_rate=0.0, variadic_args=(ids is not None, False), mask_type=mask_type,
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=window, **SCORE_MOD,
    )  # fmt: skip
    return tuple(gradients[:3])


def _asked(
    length: int, ids: Ids, options: Options
) -> tuple[cudnn.MaskType, int | None, tuple[jax.Array, jax.Array] | None]:
    """Mask type, window, and with segments what `visible` says."""
    if ids is not None:
        return cudnn.MaskType.NO_MASK, None, visible(length, ids, options)
    return cudnn.MaskType.CAUSAL if options.causal else cudnn.MaskType.NO_MASK, options.sliding_window, None
