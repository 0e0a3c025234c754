"""README's table is the one that the records make; a figure without a record is not made up."""

import json
from pathlib import Path

import pytest

from bench import report
from bench.record import append_record

ROWS = [
    {"peer": "fastjax", "bs": 8, "seq": 2048, "policy": "none", "tok_s": 100, "peak_GiB": 5.5, "step_s": 0.1}
    | {"ms_by_kind": {"matmul": 70.0, "attention": 20.0}},
    {"peer": "fastjax", "bs": 8, "seq": 2048, "policy": "full", "tok_s": 70, "peak_GiB": 2.0, "step_s": 0.2},
    {"peer": "fastjax", "bs": 8, "seq": 2048, "policy": "offload", "tok_s": 80, "peak_GiB": 1.0, "step_s": 0.2},
    {"peer": "fastjax", "bs": 1, "seq": 4096, "policy": "full", "tok_s": 1234, "peak_GiB": 1.0, "step_s": 0.2},
    {"peer": "fastjax", "bs": 1, "seq": 8192, "policy": "full", "tok_s": 50, "peak_GiB": 2.0, "step_s": 0.2},
    {"peer": "unsloth", "bs": 8, "seq": 2048, "gc": "unsloth", "tok_s": 60, "peak_GiB": 3.0},
    {"peer": "hf", "bs": 8, "seq": 2048, "gc": "False", "failed": "out of memory"},
]
TABLE = """\
| batch x sequence | fastjax | Unsloth | transformers + peft + bitsandbytes |
|---|---|---|---|
| 8x2048, nothing recomputed | 100 at 5.5 | not recorded | out of memory |
| 8x2048, recomputed or offloaded | 80 at 1.0 | 60 at 3.0 | not recorded |
| 1x4096, recomputed or offloaded | 1,234 at 1.0 | not recorded | not recorded |
| 1x8192, recomputed or offloaded | 50 at 2.0 | not recorded | not recorded |"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "results" / "x").mkdir(parents=True)
    environment = {"device": ["A card"], "date": "2026-01-01T00:00:00"}
    record = {"environment": environment, "results": ROWS}
    (tmp_path / "results" / "x" / "step.json").write_text(json.dumps(record))
    begin, end = (mark.format(device="x") for mark in report.MARKS)
    (tmp_path / "README.md").write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_a_record_is_renewed_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "step.json"
    for value, arguments in [(1, ["-m", "a", "--out", "x"]), (2, ["-m", "b"]), (3, ["-m", "a", "--out", "y"])]:
        monkeypatch.setattr("sys.orig_argv", ["python", *arguments])
        monkeypatch.setenv("FASTJAX_COMMIT", f"c{value}")
        append_record(path, {"value": value})
    rows = json.loads(path.read_text())["results"]
    assert [(row["value"], row["commit"]) for row in rows] == [(2, "c2"), (3, "c3")]
    assert all(row["device"] and row["date"] for row in rows)


def test_readme_has_the_table_that_the_records_make() -> None:
    assert report.main(["--check"]) == 0, "run python -m bench.report"


def test_the_table_and_the_plots(repository: Path) -> None:
    assert report.main(["x", "--check"]) == 1
    assert report.main(["x"]) == 0
    text = (repository / "README.md").read_text()
    assert TABLE in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert report.main(["x", "--check"]) == 0
    for name in ("speed.png", "memory.png", "time.png"):
        assert (repository / "results" / "x" / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_not_recorded_is_not_drawn(repository: Path, capsys: pytest.CaptureFixture) -> None:
    path = repository / "results" / "x" / "step.json"
    record = json.loads(path.read_text())
    record["results"] = ROWS[1:2]
    path.write_text(json.dumps(record))
    assert report.main(["x"]) == 0
    assert "memory.png: not drawn" in capsys.readouterr().err
    assert not (repository / "results" / "x" / "time.png").exists()


def test_what_was_recorded_again_is_drawn_once() -> None:
    again = ROWS[0] | {"date": "2026-01-02", "peak_GiB": 5.0}
    assert report.latest([again, *ROWS])[-1] == ROWS[4]
    assert again in report.latest([again, *ROWS])
    assert len(report.latest([again, *ROWS])) == 5


def test_a_readme_without_the_marks(repository: Path) -> None:
    (repository / "README.md").write_text("Nothing.")
    with pytest.raises(SystemExit, match="has no <!-- figures"):
        report.main(["x"])


def test_what_peers_do_not_run_is_a_table_of_its_own(repository: Path) -> None:
    path = repository / "results" / "x" / "step.json"
    record = json.loads(path.read_text())
    packed = {**ROWS[0], "policy": "auto", "packed": True, "tok_s": 90, "fraction_of_limit": 0.8}
    larger = {**ROWS[0], "shape": "llama3.1-70b", "bs": 1, "tok_s": 9, "fraction_of_limit": 0.7}
    record["results"] += [packed, larger]
    path.write_text(json.dumps(record))
    assert report.main(["x"]) == 0
    text = (repository / "README.md").read_text()
    assert TABLE in text
    assert "| llama3.1-8b, 8x2048, packed documents, as memory allows | 90 at 5.5 | 0.8 |" in text
    assert "| llama3.1-70b, 1x2048, nothing recomputed | 9 at 5.5 | 0.7 |" in text
