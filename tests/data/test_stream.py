"""A stream gives every record once an epoch, resumes anywhere, and notices that it is another."""

import itertools
import json

import numpy as np
import pytest

from fastjax.data import DataOptions, Prefetched, StreamSource, load_records, pack, tokenize_batch
from fastjax.errors import UserError

LENGTH = 64


def source_of(dataset, tokenizer, **options) -> StreamSource:
    return StreamSource(
        dataset,
        tokenize=lambda rows: tokenize_batch(rows, tokenizer, max_length=LENGTH, options=DataOptions()),
        arrange=lambda examples: pack(examples, LENGTH),
        row_length=LENGTH,
        **{"batch_size": 2, "accumulation": 1, "seed": 1} | options,
    )


def records(count: int) -> list[dict]:
    return [{"text": f"{n:05d}" * (1 + n % 9)} for n in range(count)]


def numbers(tokenizer, steps) -> list[str]:
    """The first five characters of each segment."""
    found = []
    for step in steps:
        ids, segments = (step.batch[name].reshape(-1, LENGTH) for name in ("input_ids", "segment_ids"))
        for line, marks in zip(ids, segments, strict=True):
            found += [tokenizer.decode(line[marks == s][1:6]) for s in range(1, marks.max() + 1)]
    return found


def first_epoch(source):
    return itertools.takewhile(lambda step: step.epoch == 0, source.steps())


def test_every_record_once_an_epoch(tokenizer, monkeypatch):
    monkeypatch.setattr("fastjax.data.stream.WINDOW_STEPS", 3)
    monkeypatch.setattr("fastjax.data.tokenize.BATCH", 8)
    source = source_of(records(200), tokenizer)
    steps = list(first_epoch(source))
    assert len({step.position["records"] for step in steps}) > 4  # several windows
    seen = numbers(tokenizer, steps)
    assert sorted(seen) == [f"{n:05d}" for n in range(200)]
    second = itertools.islice(source.steps(), len(steps), 2 * len(steps))
    again = numbers(tokenizer, second)
    assert sorted(again) == sorted(seen)
    assert again != seen


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["list", "file", "datasets"])
def test_resumes_anywhere(tokenizer, monkeypatch, tmp_path, kind, accumulation):
    monkeypatch.setattr("fastjax.data.stream.WINDOW_STEPS", 3)
    monkeypatch.setattr("fastjax.data.tokenize.BATCH", 8)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records(90)))
    if kind == "datasets":
        import datasets

        dataset = datasets.Dataset.from_list(records(90)).to_iterable_dataset()
    else:
        dataset = records(90) if kind == "list" else load_records(path, streaming=True)
    source = source_of(dataset, tokenizer, accumulation=accumulation)
    whole = list(itertools.islice(source.steps(), 30))
    assert whole[-1].epoch > 0
    for at in (0, 1, 7, 13, 22):
        resumed = next(source.steps(whole[at].position))
        assert resumed.position == whole[at + 1].position
        for name, array in resumed.batch.items():
            np.testing.assert_array_equal(array, whole[at + 1].batch[name])


def test_other_records_are_noticed(tokenizer):
    step = next(source_of(records(50), tokenizer).steps())
    changed = records(50)
    changed[30] = {"text": "another"}
    with pytest.raises(
        UserError, match="the training data has changed since the checkpoint, somewhere in its records 0"
    ):
        next(source_of(changed, tokenizer).steps(step.position))


def test_a_stream_that_ends(tokenizer):
    with pytest.raises(UserError, match="the training data is empty"):
        next(source_of([], tokenizer).steps())
    once = source_of(iter(records(3)), tokenizer).steps()
    next(once)
    with pytest.raises(UserError, match="could be read only once and has ended"):
        list(once)


def test_batches_made_ahead_are_the_same_and_faults_come_through():
    assert list(Prefetched(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise UserError("row 1 is bad")

    ahead = Prefetched(broken())
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(UserError, match="row 1 is bad"):
            next(ahead)
    endless = Prefetched(itertools.count())
    assert next(endless) == 0
    endless.close()
    assert not endless._thread.is_alive()
