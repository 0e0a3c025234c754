"""Examples to rows of a fixed length.

A row is a list of examples laid end to end and padded. Four int32 arrays [N, S] describe N rows:

    input_ids    the tokens, 0 on padding
    labels       unshifted, -100 on padding and on the first token of every example: its predecessor is not its context
    positions    0, 1, 2, ... within every example, 0 on padding
    segment_ids  1, 2, 3, ... within the row, 0 on padding; attention must not cross from one to another

Only the plan, which example goes where, is made ahead; the arrays of a batch are laid out when it is asked for, so that
the data set is held once, at its own size.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from fastjax.data.examples import IGNORED, Examples
from fastjax.errors import UserError

SHORTEST = 64  # the least length a batch is padded to: a shorter matrix multiplication saves nothing


class Rows:
    """A data set of rows: `plan[i]` lists the examples of row i.

    `row_length` is the most tokens a row holds. With `fixed` every batch has it, otherwise a batch is as long as its
    longest row needs, rounded up by `bucket_length`.
    """

    def __init__(self, examples: Examples, plan: list[list[int]], row_length: int, fixed: bool) -> None:
        self.examples = examples
        self.plan = plan
        self.row_length = row_length
        self.fixed = fixed
        self.lengths = examples.lengths

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return len(self.examples.tokens)

    @property
    def efficiency(self) -> float:
        """The part of the fixed-length rows that is not padding."""
        return self.tokens / max(1, len(self) * self.row_length)

    def used(self, row: int) -> int:
        """Tokens in a row, padding not counted; row -1 is an empty one."""
        return int(self.lengths[self.plan[row]].sum()) if row >= 0 else 0

    def batch_length(self, rows: Sequence[int]) -> int:
        """S of a batch of these rows."""
        return self.row_length if self.fixed else bucket_length(max(map(self.used, rows)), self.row_length)

    def gather(self, rows: Sequence[int], length: int | None = None) -> dict[str, np.ndarray]:
        """The arrays [len(rows), S] of some rows; -1 stands for a row that is all padding.

        `length` is S where these rows are a part of a batch; by default they are all of it.
        """
        length = self.batch_length(rows) if length is None else length
        batch = {
            name: np.zeros((len(rows), length), np.int32)
            for name in ("input_ids", "labels", "positions", "segment_ids")
        }
        batch["labels"][:] = IGNORED
        for line, row in enumerate(rows):
            start = 0
            for segment, index in enumerate(self.plan[row] if row >= 0 else [], start=1):
                example = self.examples[index]
                size = len(example.input_ids)
                span = slice(start, start + size)
                batch["input_ids"][line, span] = example.input_ids
                batch["labels"][line, start + 1 : start + size] = example.labels[1:]
                batch["positions"][line, span] = np.arange(size)
                batch["segment_ids"][line, span] = segment
                start += size
        return batch


def pack(examples: Examples, row_length: int) -> Rows:
    """Best-fit decreasing: from the longest example to the shortest, each goes to the row it leaves the least room in.

    Equal lengths keep their order, so the same examples give the same rows.
    """
    check_lengths(examples, row_length)
    lengths = examples.lengths
    plan: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the room left in them
    rooms: list[int] = []  # the sizes of room that some row has, sorted
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, row = row_length, len(plan)
            plan.append([])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place]
        plan[row].append(int(index))
        left = room - length
        if left and not rows_with[left]:
            bisect.insort(rooms, left)
        rows_with[left].append(row)
    return Rows(examples, plan, row_length, fixed=True)


def unpacked(examples: Examples, row_length: int) -> Rows:
    """One example a row."""
    check_lengths(examples, row_length)
    return Rows(examples, [[index] for index in range(len(examples))], row_length, fixed=False)


def check_lengths(examples: Examples, row_length: int) -> None:
    if row_length < 2:
        raise UserError(f"{row_length=} must be at least 2: a token to predict needs one before it.")
    longest = int(examples.lengths.max(initial=0))
    if longest > row_length:
        raise UserError(f"an example of {longest} tokens does not fit a row of {row_length}: cut it in tokenising.")


def bucket_length(needed: int, longest: int) -> int:
    """`needed` rounded up to 64, 128, 192, 256, 384, 512, 768, ... but no further than `longest`.

    Each length is compiled once. Powers of two and their three-halves keep the lengths few and the padding, past 64,
    below a third.
    """
    length = SHORTEST
    while length < needed:
        length = length * 3 // 2 if length & (length - 1) == 0 and length > SHORTEST else 1 << length.bit_length()
    return min(length, longest)
