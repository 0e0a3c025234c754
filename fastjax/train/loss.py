"""The language-model loss: next-token cross entropy, summed over the labelled tokens of a batch.

A sum and a count rather than a mean, so that micro-batches and devices can be added up and divided once: any split of
a batch gives the same loss and gradients.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastjax.models.decoder import Gather, Runs
from fastjax.models.llama import Llama
from fastjax.parallel.sequence import SequenceSplit
from pallas_kernels import linear_cross_entropy

IGNORED = -100
Batch = dict[str, jax.Array]
LossFn = Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]


def next_token_labels(labels: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"]:
    """The label each position predicts: the next position's, and none across a segment's end or in padding."""
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is None:
        return following
    next_segment = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((segment_ids == next_segment) & (segment_ids > 0), following, IGNORED)


def causal_lm_loss(
    model: Llama,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    runs: Runs | None = None,
    gather_layer: Gather | None = None,
    gather_head: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    noise: tuple[jax.Array, float] | None = None,
    tensor: str | None = None,
    split: SequenceSplit | None = None,
    first_row: jax.Array | int = 0,
    rows_over: Sequence[str] = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the losses, number of labelled tokens), both float32. Logits are never whole in memory.

    Options are those of Llama.hidden. `gather_head` is given the head, of which the model has this device's part, and what has
    to be there before all of it may be. The devices of the axis `tensor` each have some words of the head, all get the loss.
    With a `split` the batch holds whole rows, and the sums are over the device's own part of each.
    """
    segment_ids = batch.get("segment_ids")
    hidden = model.hidden(
        batch["input_ids"],
        batch.get("positions"),
        segment_ids,
        dropout_key=dropout_key,
        runs=runs,
        gather=gather_layer,
        noise=noise,
        tensor=tensor,
        split=split,
        first_row=first_row,
        rows_over=rows_over,
    )
    labels = next_token_labels(batch["labels"], segment_ids)
    labels = (labels if split is None else split.own(labels, IGNORED)).reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    head = model.head_weight() if gather_head is None else gather_head(model.head_weight(), rows)
    losses = linear_cross_entropy(rows, head, labels, axis_name=tensor)
    return losses.sum(), (labels != IGNORED).sum().astype(jnp.float32)
