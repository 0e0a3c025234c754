"""The cache of tokenised data sets: hit by the same data, tokenizer and settings, and by nothing else."""

import numpy as np
import pytest
from safetensors import SafetensorError

from fastjax.data import DataOptions, load_records, tokenize_dataset


@pytest.fixture
def path(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a ", "completion": "fox"}\n{"prompt": "b", "completion": 5}\n')
    return tmp_path / "data.jsonl"


def test_a_second_run_tokenises_nothing(tmp_path, path, tokenizer, monkeypatch):
    def run(**changes):
        options = DataOptions(bad_rows="drop", **changes)
        return tokenize_dataset(load_records(path), tokenizer, max_length=16, options=options, cache=tmp_path / "c")

    calls = []
    encode = __import__("fastjax.data.tokenize", fromlist=["encode"]).encode
    monkeypatch.setattr("fastjax.data.tokenize.encode", lambda *args: calls.append(args) or encode(*args))
    first, second = run(), run()
    assert len(calls) == 1
    assert second.report == first.report
    assert len(first.report.dropped) == 1
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run(completion_only_loss=False)
    assert len(calls) == 2
    tokenizer.chat_template = "other"
    run()
    assert len(calls) == 3
    path.write_text(path.read_text().replace("fox", "dog"))
    run()
    assert len(calls) == 4
    for file in (tmp_path / "c").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    run()  # damaged files are made anew
    assert len(calls) == 5
    run()
    assert len(calls) == 5
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_none(tmp_path, path, tokenizer, monkeypatch):
    def full(*args):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("fastjax.data.cache.save_file", full)
    options = DataOptions(bad_rows="drop")
    assert (
        len(tokenize_dataset(load_records(path), tokenizer, max_length=16, options=options, cache=tmp_path / "c")) == 1
    )
