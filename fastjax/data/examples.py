"""Tokenised examples, held flat: all tokens end to end, so that millions of examples cost no more than their tokens."""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy.typing import ArrayLike

IGNORED = -100


class Example(NamedTuple):
    """One example: int32 arrays of one length; labels[i] is input_ids[i], or -100 where nothing is learnt from it."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the records of a data set."""

    records: int = 0
    cut: int = 0  # longer than max_length, its rest left out
    split: int = 0  # longer than max_length, made into several examples
    dropped: tuple[str, ...] = ()  # a sentence for each record left out

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.records + other.records,
            self.cut + other.cut,
            self.split + other.split,
            self.dropped + other.dropped,
        )


class Summary(NamedTuple):
    """What takes every token to know."""

    checksum: int  # of every token and label and of where examples begin
    largest: int  # token; 0 if there is none


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Example i has the tokens starts[i] to starts[i + 1]; `trained` says which of them are labels.

    Tokens and labels may be a file's, mapped into memory: of these only what is asked for is read, and `known` spares a
    reader of some examples to go through all.
    """

    tokens: Int32[np.ndarray, "N"]
    trained: Bool[np.ndarray, "N"]
    starts: Int64[np.ndarray, "E+1"]
    report: Report = dataclasses.field(default_factory=Report)
    known: Summary | None = None

    @classmethod
    def of(cls, parts: Iterable[tuple[ArrayLike, ArrayLike]], report: Report | None = None) -> "Examples":
        """From (token ids, which of them are labels) of each example."""
        arrays = [(np.asarray(ids, np.int32), np.asarray(trained, bool)) for ids, trained in parts]
        starts = np.cumsum([0, *(len(ids) for ids, _ in arrays)], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in arrays)])
        trained = np.concatenate([np.zeros(0, bool), *(trained for _, trained in arrays)])
        return cls(tokens, trained, starts, Report(records=len(arrays)) if report is None else report)

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """The examples of all parts, in order."""
        ends = np.cumsum([0, *(len(part.tokens) for part in parts)])
        starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)]),
            np.concatenate([np.zeros(0, bool), *(part.trained for part in parts)]),
            np.concatenate([np.zeros(1, np.int64), *starts]),
            sum((part.report for part in parts), Report()),
        )

    @property
    def lengths(self) -> Int64[np.ndarray, "E"]:
        return np.diff(self.starts)

    @functools.cached_property
    def summary(self) -> Summary:
        if self.known is not None:
            return self.known
        checksum = 0
        for array in (self.tokens, self.trained, self.starts):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        return Summary(checksum, int(self.tokens.max(initial=0)))

    @property
    def checksum(self) -> int:
        return self.summary.checksum

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(*self.starts[index % len(self) :][:2])
        ids = self.tokens[span]
        return Example(ids, np.where(self.trained[span], ids, np.int32(IGNORED)))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class ExampleRecords(Sequence):
    """Examples as the records that TRL makes of them: {"input_ids": [...], "labels": [...]}."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {name: array.tolist() for name, array in self.examples[index]._asdict().items()}
