"""The progress line: it says what is waited for, and fits a terminal of 80 columns with room for its bar."""

import io

import pytest

from fastjax.train.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    console = Console(30_000, 0, quiet=False)
    console.bar.dynamic_ncols, console.bar.ncols = None, 80
    assert "0/30000 steps [00:00, compiling]" in str(console.bar)
    record = {"step": 9_999, "loss": 12.3456, "grad_norm": 1.0, "skipped": 0, "learning_rate": 2e-4}
    console.record(record | {"tokens_per_second": 18_456.0, "peak_memory_gib": 129.16})
    console.advance(36_000.0)
    line = str(console.bar)
    assert line.endswith("10:00:00 left, loss 12.3456, 129.2 GiB]")
    assert len(line.partition("|")[2].partition("|")[0]) >= 5
    console.close()
    assert "18,456 tok/s" in capsys.readouterr().out
