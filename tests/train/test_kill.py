"""A run killed outright while it saves ends as one that never was."""

from pathlib import Path

import pytest

from bench.kill_resume import measure
from tests.lightly import environment


def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    found = measure(tmp_path, kills=1, steps=40)
    assert len(found["kills"]) == 1
    assert all(kill["checkpoints"] for kill in found["kills"])
    assert found["losses_identical"]
    assert found["adapter_identical"]
