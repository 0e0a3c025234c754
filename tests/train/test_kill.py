"""A run killed outright while it saves ends as one that never was."""

from pathlib import Path

import pytest

from bench.kill_resume import measure

# three processes run the same programs: they are compiled once, and lightly
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    found = measure(tmp_path, kills=1, steps=40)
    assert len(found["kills"]) == 1
    assert all(kill["checkpoints"] for kill in found["kills"])
    assert found["losses_identical"]
    assert found["adapter_identical"]
