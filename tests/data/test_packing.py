"""Rows: nothing lost, nothing crossed, little padding."""

import numpy as np
import pytest

from fastjax.data import Examples, pack, unpacked
from fastjax.data.examples import IGNORED
from fastjax.data.packing import bucket_length
from fastjax.errors import UserError


def examples_of(lengths, starts=None) -> Examples:
    """Ids count up from each start, without a gap if none is given; every third is not labelled."""
    starts = np.cumsum([1, *lengths[:-1]]) if starts is None else starts
    ids = [np.arange(start, start + length) for length, start in zip(lengths, starts, strict=True)]
    return Examples.of([(each, each % 3 != 0) for each in ids])


def segments(batch):
    """The examples found in a batch, each as (ids, labels, positions), padding aside."""
    for line in range(len(batch["input_ids"])):
        marks = batch["segment_ids"][line]
        for segment in range(1, marks.max() + 1):
            place = marks == segment
            yield tuple(batch[name][line][place] for name in ("input_ids", "labels", "positions"))


def test_a_row_by_hand():
    batch = pack(examples_of([3, 2], [100, 50]), 8).gather([0])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 50, 51, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 101, -100, -100, -100, -100, -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert {array.dtype.name for array in batch.values()} == {"int32"}


@pytest.mark.parametrize("arrange", [pack, unpacked])
def test_every_example_is_there_once_whole(arrange):
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    examples = examples_of(lengths)
    rows = arrange(examples, 64)
    found = sorted(segments(rows.gather(range(len(rows)))), key=lambda parts: parts[0][0])
    assert len(found) == len(examples)
    for (ids, labels, positions), original in zip(found, examples, strict=True):
        np.testing.assert_array_equal(ids, original.input_ids)
        np.testing.assert_array_equal(labels[1:], original.labels[1:])
        assert labels[0] == IGNORED  # or it would be predicted from the example before
        np.testing.assert_array_equal(positions, np.arange(len(ids)))
    assert rows.tokens == lengths.sum()


def test_segments_lie_end_to_end_from_the_left():
    batch = pack(examples_of([5, 9, 3, 7, 2, 2]), 16).gather([0, 1])
    for line in batch["segment_ids"]:
        used = line[: np.count_nonzero(line)]
        assert used.all()
        assert set(np.diff(used)) <= {0, 1}
    padding = batch["segment_ids"] == 0
    assert (batch["labels"][padding] == IGNORED).all()
    assert not batch["positions"][padding].any()


def test_best_fit_decreasing():
    # 6 and 5 open rows of 10 with 4 and 5 left; 4 goes where it fills the row, 3 and 2 fill the other
    rows = pack(examples_of([2, 4, 5, 3, 6]), 10)
    assert rows.plan == [[4, 1], [2, 3, 0]]
    assert rows.efficiency == 1.0


def test_rows_fill_up_and_are_the_same_each_time():
    lengths = np.clip(np.random.default_rng(1).lognormal(5.9, 1.0, 5000), 2, 2048).astype(
        int
    )  # mean 600 but for the cut
    rows = pack(examples_of(lengths), 2048)
    assert rows.efficiency > 0.99
    assert max(map(rows.used, range(len(rows)))) <= 2048
    assert rows.plan == pack(examples_of(lengths), 2048).plan


@pytest.mark.parametrize("arrange", [pack, unpacked])
def test_longer_examples_are_refused(arrange):
    with pytest.raises(UserError, match="an example of 9 tokens does not fit a row of 8"):
        arrange(examples_of([8, 9]), 8)


def test_unpacked_batches_are_as_long_as_they_need():
    rows = unpacked(examples_of([10, 70, 150]), 150)
    assert [rows.gather([row])["input_ids"].shape for row in range(3)] == [(1, 64), (1, 128), (1, 150)]
    assert rows.gather([0, 1])["input_ids"].shape == (2, 128)


def test_row_minus_one_is_padding():
    batch = pack(examples_of([3]), 8).gather([0, -1])
    assert (batch["labels"][1] == IGNORED).all()
    assert not batch["segment_ids"][1].any()


def test_bucket_lengths_are_few_and_close():
    chosen = [bucket_length(needed, 4096) for needed in range(1, 5000)]
    assert sorted(set(chosen)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(length >= min(needed, 4096) for needed, length in enumerate(chosen, start=1))
    assert all(length < 1.5 * needed for needed, length in enumerate(chosen, start=1) if needed > 128)


def test_rows_of_one_token_are_refused():
    with pytest.raises(UserError, match="row_length=1 must be at least 2"):
        pack(examples_of([3]), 1)
