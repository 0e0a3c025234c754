"""The softmax of one chunk's logits in jnp: what the Triton kernels do, in as many passes as XLA makes of it.

logits [R, V] are the head's own, float32 and not yet capped; a label outside [0, V) is no word of this part of the
head; `scale` [R] multiplies a row of ds, and a row whose scale is 0 is empty: nothing of it counts, NaN included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.options import Options


class Statistics(NamedTuple):
    """Of each row: log-sum-exp, the logit at its label (or 0), the sum of its logits (0 unless smoothing needs it)."""

    lse: jax.Array
    at_label: jax.Array
    total: jax.Array


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def row_statistics(logits: jax.Array, labels: jax.Array, options: Options) -> Statistics:
    logits = capped(logits, options.soft_cap)
    here = (labels >= 0) & (labels < logits.shape[1])
    at_label = jnp.take_along_axis(logits, jnp.where(here, labels, 0)[:, None], axis=1)[:, 0]
    lse = jax.nn.logsumexp(logits, axis=1)
    total = jnp.sum(logits, axis=1) if options.label_smoothing else jnp.zeros_like(lse)
    return Statistics(lse, jnp.where(here, at_label, 0), total)


def logit_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, lse: jax.Array, dtype: jnp.dtype, options: Options
) -> jax.Array:
    """ds [R, V] in `dtype`."""
    logits, lse = capped(logits, options.soft_cap), lse[:, None]
    ds = jnp.exp(logits - lse)
    if options.z_loss:
        ds *= 1 + 2 * options.z_loss * lse
    at_label = jnp.arange(logits.shape[1], dtype=labels.dtype)[None, :] == labels[:, None]
    ds -= jnp.where(at_label, options.peak + options.uniform, options.uniform)
    if options.soft_cap is not None:
        ds *= 1 - (logits / options.soft_cap) ** 2
    scale = scale[:, None]
    return jnp.where(scale == 0, 0, ds * scale).astype(dtype)


def statistics_and_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, dtype: jnp.dtype, options: Options
) -> tuple[Statistics, jax.Array]:
    statistics = row_statistics(logits, labels, options)
    return statistics, logit_gradients(logits, labels, scale, statistics.lse, dtype, options)
