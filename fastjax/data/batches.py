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
type OwnRows = np.ndarray | None  # the rows of a batch that this process lays out; None: all


class Step(NamedTuple):
    """What one step trains on."""

    batch: Batch  # int32 [B, S], or [A, B, S] where A micro-batches are accumulated; of B rows only `own` ones
    tokens: int  # of all rows, padding not counted
    position: Position  # where the next step's batch is found
    epoch: float  # that have passed after this step


@dataclasses.dataclass(frozen=True)
class RowSource:
    """The batches of rows that are all there. `fastjax.data.stream.StreamSource` is the same for a stream."""

    rows: Rows
    batch_size: int
    accumulation: int
    seed: int
    own: OwnRows = None

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.rows, self.batch_size, self.accumulation)

    def steps(self, position: Position | None = None) -> Iterator[Step]:
        """Without end, from a position on."""
        step = (position or {"step": 0})["step"]
        while True:
            chosen = chosen_at(self.rows, step, self.batch_size * self.accumulation, self.seed)
            batch = arranged(self.rows, chosen, self.batch_size, self.accumulation, self.own)
            step += 1
            yield Step(batch, token_count(self.rows, chosen), {"step": step}, step / self.steps_per_epoch)

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


def token_count(rows: Rows, chosen: Sequence[int]) -> int:
    return sum(map(rows.used, chosen))


def steps_per_epoch(rows: Rows, batch_size: int, accumulation: int = 1) -> int:
    return math.ceil(len(rows) / (batch_size * accumulation))


def batch_at(rows: Rows, step: int, *, batch_size: int, accumulation: int = 1, seed: int) -> Batch:
    """The batch of one step, counted from 0: int32 [B, S], or [A, B, S] where A = `accumulation` is more than 1."""
    return arranged(rows, chosen_at(rows, step, batch_size * accumulation, seed), batch_size, accumulation)


def chosen_at(rows: Rows, step: int, size: int, seed: int) -> list[int]:
    """Which rows a step takes, `size` or at the end of an epoch fewer."""
    epoch, within = divmod(step, steps_per_epoch(rows, size))
    return epoch_order(len(rows), seed, epoch)[within * size : (within + 1) * size].tolist()


def arranged(rows: Rows, chosen: Sequence[int], batch_size: int, accumulation: int, own: OwnRows = None) -> Batch:
    """The chosen rows, filled up with padding, as int32 [B, S] or [A, B, S]; of each micro-batch the `own` rows alone."""
    whole = np.array([*chosen, *[-1] * (batch_size * accumulation - len(chosen))]).reshape(accumulation, batch_size)
    part = whole if own is None else whole[:, own]
    batch = rows.gather(part.ravel().tolist(), rows.batch_length(chosen))
    if accumulation == 1:
        return batch
    return {name: array.reshape(*part.shape, -1) for name, array in batch.items()}


def batches(
    rows: Rows, *, batch_size: int, accumulation: int = 1, epochs: float = 1.0, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """The batches of a run in order; `epochs` may end in the middle of one, `start_step` skips what is already done."""
    for step in range(start_step, math.ceil(epochs * steps_per_epoch(rows, batch_size, accumulation))):
        yield batch_at(rows, step, batch_size=batch_size, accumulation=accumulation, seed=seed)


def in_order(rows: Rows, batch_size: int, own: OwnRows = None) -> Iterator[Batch]:
    """Every row once, unshuffled, as [B, S], or of each batch its `own` rows: what evaluation goes through."""
    for start in range(0, len(rows), batch_size):
        yield arranged(rows, range(start, min(start + batch_size, len(rows))), batch_size, 1, own)


@functools.lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
