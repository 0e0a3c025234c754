"""Where a run's rows come from: of several processes the first reads the data, and the others the tokens of their own rows."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fastjax.data import Unread
from fastjax.errors import UserError
from fastjax.train.config import SFTConfig
from fastjax.train.sources import make_source

TEXTS = [{"text": f"{n} sheep and {n} more." * (1 + n % 3)} for n in range(11)]


MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=272), max_seq_length=64)


def test_only_the_first_process_reads_the_data(tiny_tokenizer, tmp_path, monkeypatch):
    args = SFTConfig(output_dir=str(tmp_path), packing=True, max_length=64, disable_tqdm=True)
    waited = []

    def source(process: int, dataset, own=None):
        monkeypatch.setattr("fastjax.train.sources.is_writer", lambda: process == 0)
        return make_source(dataset, tiny_tokenizer, MODEL, args, 4, own)

    alone = source(0, TEXTS)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("fastjax.train.sources.wait_for_all", waited.append)
    with pytest.raises(UserError, match=r"train_dataset\.safetensors, .* choose an output_dir on a disk that all"):
        source(1, Unread())
    halves = [source(0, TEXTS, np.array([0, 1])), source(1, Unread(), np.array([2, 3]))]
    assert waited == ["train_dataset tokenised"] * 3
    # nothing but where examples begin is in memory, and what takes all tokens to know was told
    examples = halves[1].rows.examples
    assert isinstance(examples.tokens, np.memmap)
    assert isinstance(examples.trained, np.memmap)
    assert examples.known == alone.rows.examples.summary
    assert halves[1].identity() == alone.identity()
    steps = zip(*(each.steps() for each in (alone, *halves)), strict=True)
    for whole, first, second in itertools.islice(steps, 5):
        for name, values in whole.batch.items():
            np.testing.assert_array_equal(np.concatenate([first.batch[name], second.batch[name]]), values)
        assert first.tokens == second.tokens == whole.tokens
