"""The benchmark's command and its plot, on invented measurements."""

import json

import pytest

import bench.kernels.__main__ as command
from bench.kernels import roofline, timing
from bench.trace import Kernel

ROWS = [
    {"op": "a", "case": "8192 rows", "implementation": "triton", "us": 25123.4, "TFLOP/s": 640.0, "ceiling": 800.0}
    | {"ratio": 0.8, "flops_per_byte": 900},
    {
        "op": "b",
        "case": "copy",
        "implementation": "xla",
        "us": 12.345,
        "GB/s": 3900.0,
        "ceiling": 4100.0,
        "ratio": 0.951,
    },
]


def rows():
    return ROWS


def fails():
    raise RuntimeError("no such GPU")


def test_every_benchmark_is_found():
    assert "linear_cross_entropy" in command.benchmarks()


def test_table_and_record(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "benchmarks", lambda: {"a": rows, "b": fails})
    assert command.main(["a", "--out", str(tmp_path / "deep" / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", "case", "implementation", "us", "TFLOP/s", "GB/s", "ceiling", "ratio"]
    assert "25123.4" in lines[1]
    assert "0.951" in lines[2]
    record = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert record["results"]["rows"] == ROWS
    assert record["environment"]["device"]


def test_a_failure_costs_no_other_op(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "benchmarks", lambda: {"b": fails, "a": rows})
    assert command.main(["--out", str(tmp_path / "all.json")]) == 1
    output = capsys.readouterr()
    assert "no such GPU" in output.err
    assert "25123.4" in output.out
    assert json.loads((tmp_path / "all.json").read_text())["results"]["failed"] == ["b"]


def test_an_unknown_op_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "benchmarks", lambda: {"a": rows})
    with pytest.raises(SystemExit):
        command.main(["c"])
    assert "no benchmark for c: choose from a" in capsys.readouterr().err


@pytest.mark.parametrize("measured", [ROWS, ROWS[:1], ROWS[1:], []])
def test_roofline(tmp_path, measured):
    environment = {"device": ["NVIDIA H200"], "date": "2026-01-01T00:00:00+00:00", "commit": "abc"}
    (tmp_path / "in.json").write_text(json.dumps({"environment": environment, "results": {"rows": measured}}))
    roofline.main([str(tmp_path / "in.json"), str(tmp_path / "plots" / "out.png")])
    assert (tmp_path / "plots" / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert roofline.ceilings(ROWS) == (800.0, 4100.0)


def test_a_call_is_the_sum_of_its_kernels_without_gaps():
    starts = [0.0, 10.0, 100.0, 115.0, 200.0, 230.0]
    kernels = [Kernel("k", start, 4.0 + i, "") for i, start in enumerate(starts)]
    assert timing.per_call(kernels[::-1], 3) == [9.0, 13.0, 17.0]
    with pytest.raises(RuntimeError, match="6 kernels in 4 calls"):
        timing.per_call(kernels, 4)
    with pytest.raises(RuntimeError, match="0 kernels"):
        timing.per_call([], 4)
