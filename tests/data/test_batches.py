"""Batches: each epoch goes through every row once, and a step's batch depends on nothing but the seed and the step."""

import dataclasses
import functools
import itertools
import operator

import numpy as np
import pytest

from fastjax.data import Examples, RowSource, batch_at, batches, in_order, steps_per_epoch, unpacked

LENGTH = 64


def rows_of(count: int):
    """Row i holds the token i + 1, twice."""
    return unpacked(Examples.of([([i + 1, i + 1], [True, True]) for i in range(count)]), LENGTH)


def seen(batch) -> list[int]:
    """The rows in a batch by their token, 0 for one that is padding."""
    return batch["input_ids"].reshape(-1, LENGTH)[:, 0].tolist()


def test_an_epoch_is_every_row_once_and_padding():
    found = [seen(batch) for batch in batches(rows_of(11), batch_size=2, accumulation=2, seed=1)]
    assert len(found) == steps_per_epoch(rows_of(11), 2, 2) == 3
    assert sorted(functools.reduce(operator.iadd, found, [])) == [0, *range(1, 12)]
    last = list(batches(rows_of(11), batch_size=4, seed=1))[-1]
    assert (last["labels"][-1] == -100).all()
    assert not last["segment_ids"][-1].any()


def test_epochs_differ_and_seeds_differ():
    def order(seed, epochs):
        return [row for batch in batches(rows_of(8), batch_size=2, epochs=epochs, seed=seed) for row in seen(batch)]

    two = order(1, 2)
    assert sorted(two[:8]) == sorted(two[8:]) == list(range(1, 9))
    assert two[:8] != two[8:]
    assert order(1, 1) == two[:8]
    assert order(2, 1) != two[:8]
    assert two[:8] != list(range(1, 9))


def test_resuming_needs_only_the_step():
    whole = list(batches(rows_of(7), batch_size=2, epochs=3, seed=5))
    for start in range(len(whole)):
        resumed = next(iter(batches(rows_of(7), batch_size=2, epochs=3, seed=5, start_step=start)))
        for name in resumed:
            np.testing.assert_array_equal(resumed[name], whole[start][name])


def test_a_run_may_end_within_an_epoch():
    assert len(list(batches(rows_of(10), batch_size=2, epochs=1.5, seed=0))) == 8


@pytest.mark.parametrize(("accumulation", "shape"), [(1, (2, LENGTH)), (3, (3, 2, LENGTH))])
def test_shapes(accumulation, shape):
    batch = batch_at(rows_of(9), 0, batch_size=2, accumulation=accumulation, seed=0)
    assert {array.shape for array in batch.values()} == {shape}
    assert set(batch) == {"input_ids", "labels", "positions", "segment_ids"}


def test_in_order_is_every_row_once():
    found = [seen(batch) for batch in in_order(rows_of(5), 2)]
    assert found == [[1, 2], [3, 4], [5, 0]]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_share_a_batch(accumulation):
    """Each lays out its own rows of the batch that one process would have; all pad to the same length."""
    rows = unpacked(Examples.of([([1] * n, [True] * n) for n in range(2, 200, 7)]), 256)
    parts = [np.array([0, 1]), np.array([2, 3])]
    whole = RowSource(rows, 4, accumulation, seed=1)
    shared = [dataclasses.replace(whole, own=part) for part in parts]
    assert all(source.identity() == whole.identity() for source in shared)
    for step, *others in itertools.islice(zip(*(source.steps() for source in (whole, *shared)), strict=True), 12):
        assert all(other[1:] == step[1:] for other in others)
        assert step.tokens == (step.batch["segment_ids"] > 0).sum()
        for name, values in step.batch.items():
            np.testing.assert_array_equal(np.concatenate([other.batch[name] for other in others], axis=-2), values)
    evaluated = zip(in_order(rows, 4), *(in_order(rows, 4, part) for part in parts), strict=True)
    for batch, *others in evaluated:
        np.testing.assert_array_equal(np.concatenate([other["labels"] for other in others]), batch["labels"])
