"""Rows to the batches of a training run.

The batch of a step is a function of (seed, step) alone: every epoch has its own permutation of the rows, and a step takes
the next `batch_size * accumulation` of them. A run that resumes at step k therefore needs k and nothing else. The last step
of an epoch fills up with rows of padding, which carry no label: nothing is lost and nothing counted twice.
"""

import functools
import math
from collections.abc import Iterator

import numpy as np

from fastjax.data.packing import Rows

type Batch = dict[str, np.ndarray]


def steps_per_epoch(rows: Rows, batch_size: int, accumulation: int = 1) -> int:
    return math.ceil(len(rows) / (batch_size * accumulation))


def batch_at(rows: Rows, step: int, *, batch_size: int, accumulation: int = 1, seed: int) -> Batch:
    """The batch of one step, counted from 0: int32 [B, S], or [A, B, S] where A = `accumulation` is more than 1."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch_size, accumulation))
    size = batch_size * accumulation
    chosen = epoch_order(len(rows), seed, epoch)[within * size : (within + 1) * size]
    batch = rows.gather(np.pad(chosen, (0, size - len(chosen)), constant_values=-1).tolist())
    if accumulation == 1:
        return batch
    return {name: array.reshape(accumulation, batch_size, -1) for name, array in batch.items()}


def batches(
    rows: Rows, *, batch_size: int, accumulation: int = 1, epochs: float = 1.0, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """The batches of a run in order; `epochs` may end in the middle of one, `start_step` skips what is already done."""
    for step in range(start_step, math.ceil(epochs * steps_per_epoch(rows, batch_size, accumulation))):
        yield batch_at(rows, step, batch_size=batch_size, accumulation=accumulation, seed=seed)


def in_order(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, unshuffled, as [B, S]: what evaluation goes through."""
    for start in range(0, len(rows), batch_size):
        chosen = range(start, min(start + batch_size, len(rows)))
        yield rows.gather([*chosen] + [-1] * (batch_size - len(chosen)))


@functools.lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
