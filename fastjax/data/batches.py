"""Rows to the batches of a training run.

The batch of a step is a function of (seed, step) alone: every epoch has its own permutation of the rows, and a step takes
the next `batch_size * accumulation` of them. A run that resumes at step k therefore needs k and nothing else. The last step
of an epoch fills up with rows of padding, which carry no label: nothing is lost and nothing counted twice.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastjax.data.packing import Rows

type Batch = dict[str, np.ndarray]
type Position = dict[str, int]


class Step(NamedTuple):
    """What one step trains on."""

    batch: Batch  # int32 [B, S], or [A, B, S] where A micro-batches are accumulated
    tokens: int  # padding not counted
    position: Position  # where the next step's batch is found
    epoch: float  # that have passed after this step


@dataclasses.dataclass(frozen=True)
class RowSource:
    """The batches of rows that are all there. `fastjax.data.stream.StreamSource` is the same for a stream."""

    rows: Rows
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.rows, self.batch_size, self.accumulation)

    def steps(self, position: Position | None = None) -> Iterator[Step]:
        """Without end, from a position on."""
        step = (position or {"step": 0})["step"]
        while True:
            batch = batch_at(
                self.rows, step, batch_size=self.batch_size, accumulation=self.accumulation, seed=self.seed
            )
            step += 1
            yield Step(batch, token_count(batch), {"step": step}, step / self.steps_per_epoch)

    def identity(self) -> dict[str, Any]:
        """What the batches follow from: a run that resumes must find the same."""
        return {
            "packing": self.rows.fixed,
            "max_length": self.rows.row_length,
            "rows": len(self.rows),
            "rows_per_step": self.batch_size * self.accumulation,
            "checksum": self.rows.examples.checksum,
            "seed": self.seed,
        }


def token_count(batch: Batch) -> int:
    return int((batch["segment_ids"] > 0).sum())


def steps_per_epoch(rows: Rows, batch_size: int, accumulation: int = 1) -> int:
    return math.ceil(len(rows) / (batch_size * accumulation))


def batch_at(rows: Rows, step: int, *, batch_size: int, accumulation: int = 1, seed: int) -> Batch:
    """The batch of one step, counted from 0: int32 [B, S], or [A, B, S] where A = `accumulation` is more than 1."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch_size, accumulation))
    size = batch_size * accumulation
    chosen = epoch_order(len(rows), seed, epoch)[within * size : (within + 1) * size]
    return arranged(rows, chosen.tolist(), batch_size, accumulation)


def arranged(rows: Rows, chosen: Sequence[int], batch_size: int, accumulation: int) -> Batch:
    """The chosen rows, filled up with padding, as int32 [B, S] or [A, B, S]."""
    missing = batch_size * accumulation - len(chosen)
    batch = rows.gather([*chosen, *[-1] * missing])
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
