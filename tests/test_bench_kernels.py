"""The benchmark's command, bars and plot, on invented measurements; what it measures, on the CPU, checked but not timed."""

import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench.kernels.__main__ as command
from bench.kernels import (
    _bandwidth,
    _check,
    between_attentions,
    dequantize_nf4,
    flash_attention,
    nf4_matmul,
    roofline,
    timing,
)
from bench.kernels._bars import BARS, Bar, judged
from bench.trace import Kernel
from pallas_kernels.nf4 import quantize_nf4
from pallas_kernels.workloads import attention, lognormal_attention, product

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
    {"op": "b", "case": "odd", "implementation": "triton", "failed": "Disagreement: off"},
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(command, "cuda_capability", lambda: (9, 0))


def rows():
    return ROWS


def bare(recorded):
    """Without what says when it was measured."""
    return [{name: value for name, value in row.items() if name not in ("commit", "date")} for row in recorded]


def fails():
    raise RuntimeError("no such GPU")


def fails_later():
    yield ROWS[0]
    fails()


def test_every_benchmark_is_found():
    assert "linear_cross_entropy" in command.benchmarks()


def test_table_and_record(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "benchmarks", lambda: {"a": rows, "b": fails})
    assert command.main(["a", "--out", str(tmp_path / "deep" / "a.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", "case", "implementation", "us", "TFLOP/s", "GB/s", "ceiling", "ratio", "failed"]
    assert "25123.4" in lines[1]
    assert "0.951" in lines[2]
    record = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert bare(record["results"]["rows"]) == ROWS
    assert all(row["commit"] == record["environment"]["commit"] for row in record["results"]["rows"])
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_of_other_ops_stay(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    first, second = ({"op": "a", "implementation": "x", "us": us} for us in (1.0, 2.0))
    for op, measured in (("a", [first]), ("b", [ROWS[2]]), ("a", [second])):
        monkeypatch.setattr(command, "benchmarks", lambda op=op, measured=measured: {op: lambda: measured})
        command.main(["--out", str(path)])
    assert bare(json.loads(path.read_text())["results"]["rows"]) == [ROWS[2], second]


def test_a_failure_costs_no_other_op(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "benchmarks", lambda: {"b": fails_later, "a": rows})
    assert command.main(["--out", str(tmp_path / "all.json")]) == 1
    output = capsys.readouterr()
    assert "no such GPU" in output.err
    assert "25123.4" in output.out
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    assert results["failed"] == ["b"]
    assert bare(results["rows"]) == [ROWS[0], *ROWS]  # and what it had measured by then


@dataclasses.dataclass(eq=False)
class SimpleProcess:
    wait: Callable[[], int]
    send_signal: Callable[[int], None] = lambda number: None


def test_ops_on_several_gpus(monkeypatch, tmp_path):
    """Each in a process that sees one GPU, no two at once on the same."""
    busy, seen = set(), []

    def run(arguments, env, **_):
        """A process that has ended before anyone waits for it."""
        gpu, op = env["CUDA_VISIBLE_DEVICES"], arguments[3]
        assert gpu not in busy
        busy.add(gpu)
        seen.append(op)
        command.record(command.Path(arguments[5]), [], [ROWS[0] | {"op": op}] if op != "b" else [], [])
        busy.remove(gpu)
        return SimpleProcess(lambda: int(op == "b"))

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=run, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(command, "benchmarks", lambda: dict.fromkeys(("a", "b", "nf4_matmul")))
    monkeypatch.setattr(command.roofline, "main", lambda arguments: None)
    out = tmp_path / "all.json"
    assert command.main(["--gpus", "2,3", "--out", str(out)]) == 1
    results = json.loads(out.read_text())["results"]
    assert sorted(row["op"] for row in results["rows"]) == ["a", "nf4_matmul"]
    assert results["failed"] == ["b"]
    assert set(seen[:2]) & {"nf4_matmul"}


def test_ctrl_c_keeps_what_was_measured(monkeypatch, capsys, tmp_path):
    """Of processes too: the one that runs is told and has written a row, the next is not begun."""
    told, begun = threading.Event(), []

    def interrupted():
        yield ROWS[0]
        raise KeyboardInterrupt

    def run(arguments, **_):
        begun.append(arguments[3])
        command.record(command.Path(arguments[5]), [], [ROWS[0] | {"op": arguments[3]}], [])
        return SimpleProcess(lambda: told.wait(10) and 130, lambda number: told.set())

    def pressed(futures):
        while not begun:
            time.sleep(0.001)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(command.roofline, "main", lambda arguments: None)
    monkeypatch.setattr(command, "benchmarks", lambda: dict.fromkeys(("a", "b"), interrupted))
    out = tmp_path / "all.json"
    assert command.main(["--out", str(out)]) == 130
    assert "25123.4" in capsys.readouterr().out
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=run, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(command, "as_completed", pressed)
    assert command.main(["--gpus", "0", "--out", str(out)]) == 130
    results = json.loads(out.read_text())["results"]
    assert [row["op"] for row in results["rows"]] == begun == results["failed"]
    assert len(begun) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_a_gpu_is_given_back_after_an_error(monkeypatch):
    """Else the next op waits for it forever, and this test with it."""

    def run(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=run, DEVNULL=subprocess.DEVNULL))
    with pytest.raises(OSError, match="no more processes"):
        list(command.spread(["a", "b"], ["0"]))


def test_bars():
    bars = (Bar("a", "8192 *", "triton", "ratio", ">=", 0.8), Bar("a", "*", "triton", "us", "<=", 100))
    met, other, failed = judged(ROWS, bars)
    assert (met["bar"], met["met"]) == ("ratio >= 0.8 and us <= 100", False)
    assert "met" not in other
    assert "met" not in failed
    assert judged([failed], [Bar("b", "odd", "triton", "ratio", ">=", 0.5)])[0]["met"] is False
    assert "0 of 1 bars met\nnot met: a 8192 rows (triton): ratio >= 0.8 and us <= 100" in command.verdict([met, other])
    assert {bar.op for bar in BARS} <= set(command.benchmarks())


def test_what_is_wrong_is_not_timed():
    right = jnp.ones((4, 8))
    calls = {"right": lambda: right, "wrong": lambda: right.at[0, 0].set(2), "raises": fails}
    calls |= {"nothing": lambda: right * jnp.nan}
    able, failed = _check.verified("a", "case", calls, lambda result: _check.agree(result, right))
    assert list(able) == ["right"]
    assert [row["implementation"] for row in failed] == ["wrong", "raises", "nothing"]
    assert "off by 0.18" in failed[0]["failed"]
    with pytest.raises(_check.Disagreement, match="1 of 32 values"):
        _check.same(right, right.at[3, 3].set(1 + 2**-23))
    with pytest.raises(_check.Disagreement):
        _check.agree(0 * right, 0 * right)  # zeros prove nothing


def untimed(calls, rounds=0):
    """A microsecond each, but called twice, as a timer would."""
    for call in [*calls.values()] * 2:
        call()
    return {name: 1e-6 * (1 + i) for i, name in enumerate(calls)}


@pytest.fixture
def lightly(monkeypatch):
    """Programs are checked here, not timed (every test's set-up undoes this); packed weights are made of random bytes."""
    jax.config.update("jax_disable_most_optimizations", True)
    rng = np.random.default_rng(0)

    def fill(leaf):
        drawn = (
            rng.integers(0, 256, leaf.shape, np.uint8)
            if leaf.dtype == jnp.uint8
            else rng.uniform(0.01, 0.02, leaf.shape)
        )
        return jnp.asarray(drawn.astype(leaf.dtype))

    monkeypatch.setattr(nf4_matmul, "quantize_nf4", lambda w: jax.tree.map(fill, jax.eval_shape(quantize_nf4, w)))


@pytest.mark.usefixtures("lightly")
def test_packed_products_with_lora(monkeypatch):
    monkeypatch.setattr(nf4_matmul, "times_in_turns", untimed)
    rows = list(nf4_matmul.rows(("tiny/qkv/40",)))
    by = {(row["case"], row["implementation"]): row for row in rows}
    for which in nf4_matmul.PASSES:
        assert by[f"tiny/qkv/40 {which}", "chosen"].keys() >= {"us", "ratio", "ceiling"}
        assert by[f"tiny/qkv/40 {which}", nf4_matmul.DENSE]["ratio"] == 1


@pytest.mark.usefixtures("lightly")
def test_packed_product_without_its_lora_is_found_out(monkeypatch):
    monkeypatch.setattr(nf4_matmul, "times_in_turns", untimed)
    monkeypatch.setattr(nf4_matmul, "project_into", lambda x, a, scales: x.at[:, a.shape[0] :].set(0))
    failed = [row for row in nf4_matmul.rows(("tiny/o/40",)) if row["implementation"] == "chosen"]
    assert len(failed) == 2
    assert all("Disagreement" in row["failed"] for row in failed)


@pytest.mark.usefixtures("lightly")
def test_a_layer_of_a_token(monkeypatch):
    monkeypatch.setattr(
        between_attentions, "times_in_turns", lambda calls: {name: call() and 1e-6 for name, call in calls.items()}
    )
    monkeypatch.setattr(dequantize_nf4, "copy_bandwidth", lambda: 1e12)
    failed, able = between_attentions.measure("tiny", 2, 128, 192, 64)
    assert "needs an NVIDIA GPU" in failed["failed"]
    assert (able["implementation"], able["us"]) == ("separate", 1.0)


@pytest.mark.usefixtures("lightly")
def test_attention(monkeypatch):
    name = "tiny/attention/2x80"
    shape = dataclasses.replace(
        attention(name), lengths=((20, 60), (80,))
    )  # packed, which causal is the simpler case of
    monkeypatch.setattr(flash_attention, "times_in_turns", untimed)
    monkeypatch.setattr(flash_attention, "matmul_rate", lambda: 1e12)
    rows = list(flash_attention._measure(shape))
    able = [row["case"] for row in rows if "failed" not in row]
    assert able == [f"{name} forward"] + 2 * [f"{name} forward+backward"]  # as chosen, on the CPU
    assert all("needs an NVIDIA GPU" in row["failed"] for row in rows if "failed" in row)


def test_peers_and_speedup():
    times = {"chosen": 2.0, "triton": 4.0, "cudnn": 3.0, "tokamax triton": 6.0}
    rows = flash_attention._with_peers(
        [{"case": "whole f", "implementation": name, "us": us} for name, us in times.items()]
    )
    assert (rows[0]["peer"], rows[0]["against_peer"], rows[1]["against_peer"]) == ("cudnn", 1.5, 1.5)
    packed = [{"case": "packed f", "implementation": "chosen", "us": 0.5}]
    assert flash_attention._with_speedup(packed, rows, "packed", "whole")[0]["speedup"] == 4


def test_bandwidth_rows(monkeypatch):
    monkeypatch.setattr(_bandwidth, "_in_turns", lambda cases: dict.fromkeys(cases, 1e-6))
    functions = {"xla": lambda x: 2 * x, "wrong": lambda x: 3 * x}
    good, bad = sorted(_bandwidth.compare("a", "c", 1, lambda _: _bandwidth.normal(0, (8,)), functions), key=len)[::-1]
    assert good["us"] == 1.0
    assert "Disagreement" in bad["failed"]


def test_named_workloads():
    shape = product("llama3.1-8b/qkv/256")
    assert (shape.out, shape.width, shape.heights) == (6144, 4096, (4096, 1024, 1024))
    packed, drawn = attention("llama3.1-8b/attention/1x8x1024"), lognormal_attention("llama3.1-8b/attention/2x8192")
    assert packed.row_length == drawn.row_length == 8192
    assert packed.segment_ids.max() == 8
    assert {sum(row) for row in drawn.lengths} == {8192}
    for name in ("llama3.1-9b/o/1", "tiny/o", "tiny/o/0", "tiny/attention/4", "tiny/x/4", "tiny/attention/8"):
        with pytest.raises(ValueError, match=r"MODEL/PART/SIZE"):
            attention(name)
    with pytest.raises(ValueError, match="no attention"):
        attention("tiny/o/4")


def test_what_cannot_be_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "benchmarks", lambda: {"a": rows})
    with monkeypatch.context() as patch:
        patch.setattr(command, "cuda_capability", lambda: None)
        assert command.main(["a"]) == 2
    assert "measured on an NVIDIA GPU" in capsys.readouterr().err
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


def test_calls_are_told_apart_by_pauses(monkeypatch):
    starts = np.array([0, 20, 5e6, 1e7, 1e7 + 20, 1.5e7], np.float64)
    kernels = [Kernel("k", start, duration, "") for start, duration in zip(starts, (10, 5, 4, 20, 5, 6), strict=True)]
    assert timing.bursts(kernels[::-1]) == [15, 4, 25, 6]
    monkeypatch.setattr(timing, "traced_kernels", lambda run: run() or kernels)
    times = timing.times_in_turns({"a": lambda: None, "b": lambda: None}, rounds=2)
    assert times == pytest.approx({"a": 20e-9, "b": 5e-9})
    monkeypatch.setattr(timing, "traced_kernels", lambda run: run() or kernels[:3] + kernels[:1])
    times = timing.times_in_turns({"a": lambda: None, "b": lambda: None}, rounds=4)  # a halt: by themselves
    assert times == pytest.approx({"a": 7.5e-9, "b": 7.5e-9})
