"""The batches of a data set whose end is not known: read, tokenised and packed a window at a time.

A window is as many records as make some tens of steps. Its rows are put in an order of their own, by (seed, epoch,
window); the last step of a window fills up with padding, so that windows do not depend on each other. A position is the
number of records before the window and the steps taken of it: resuming passes over those records, tokenises one window
again, and checks that it is the same as it was.

With several processes each reads and tokenises the whole stream, since where a row ends up depends on all before it; of
a batch each lays out its own rows alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastjax.data.batches import OwnRows, Position, Step, arranged, token_count
from fastjax.data.examples import Examples
from fastjax.data.packing import Rows
from fastjax.data.records import Record, iterate
from fastjax.data.tokenize import batched
from fastjax.errors import UserError

WINDOW_STEPS = 32


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """`tokenize` makes examples of (where, record)s, `arrange` rows of examples; `row_length` is the longest row's."""

    dataset: Iterable[Record]
    tokenize: Callable[[Sequence[tuple[str, Record]]], Examples]
    arrange: Callable[[Examples], Rows]
    row_length: int
    batch_size: int
    accumulation: int
    seed: int
    own: OwnRows = None

    steps_per_epoch = None

    def steps(self, position: Position | None = None) -> Iterator[Step]:
        """Without end, epoch after epoch, from a position on."""
        at = position or {"epoch": 0, "records": 0, "steps": 0}
        for epoch in itertools.count(at["epoch"]):
            resumed = at if epoch == at["epoch"] else None
            empty = True
            for step in self._epoch(epoch, resumed):
                empty = False
                yield step
            if empty and not (resumed and resumed["records"]):
                raise UserError(
                    "the training data is empty: give at least one record."
                    if epoch == 0
                    else "the training data could be read only once and has ended: give one that can be gone through"
                    " again, or fewer max_steps."
                )

    def _epoch(self, epoch: int, resumed: Position | None) -> Iterator[Step]:
        before = resumed["records"] if resumed else 0
        for window in self.windows(before):
            rows, records, checksum = self.arrange(window), window.report.records, window.checksum
            taken = resumed["steps"] if resumed and before == resumed["records"] else 0
            if taken and resumed and resumed["checksum"] != checksum:
                raise UserError(
                    f"the training data has changed since the checkpoint, somewhere in its records {before} to"
                    f" {before + records}: resume with the same data, or start anew in another output_dir."
                )
            order = np.random.default_rng([self.seed, epoch, before]).permutation(len(rows)).tolist()
            chunks = list(itertools.batched(order, self.batch_size * self.accumulation))
            for number, chosen in enumerate(chunks[taken:], start=taken + 1):
                batch = arranged(rows, chosen, self.batch_size, self.accumulation, self.own)
                position = {"epoch": epoch, "records": before, "steps": number, "checksum": checksum}
                if number == len(chunks):
                    position = {"epoch": epoch, "records": before + records, "steps": 0}
                yield Step(batch, token_count(rows, chosen), position, float(epoch))
            before += records

    def windows(self, before: int = 0) -> Iterator[Examples]:
        """The examples of some records at a time, from a record on."""
        wanted = WINDOW_STEPS * self.batch_size * self.accumulation * self.row_length
        parts: list[Examples] = []
        for batch in batched(iterate(self.dataset, before)):
            parts.append(self.tokenize(batch))
            if sum(len(part.tokens) for part in parts) >= wanted:
                yield Examples.joined(parts)
                parts = []
        if parts:
            yield Examples.joined(parts)

    def identity(self) -> dict[str, Any]:
        """What the batches follow from; the records themselves are compared where a run resumes."""
        return {
            "streaming": True,
            "max_length": self.row_length,
            "rows_per_step": self.batch_size * self.accumulation,
            "seed": self.seed,
        }
