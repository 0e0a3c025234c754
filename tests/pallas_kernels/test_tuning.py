"""Tables of choices: read, written, obeyed; and the tuner, whose candidates must be right before they are timed."""

import dataclasses
import importlib
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call, tuning
from pallas_kernels.decode_attention import op as decode
from pallas_kernels.flash_attention import mosaic_common
from pallas_kernels.flash_attention import triton as attention_triton
from pallas_kernels.flash_attention.op import AfterMosaic
from pallas_kernels.linear_cross_entropy import triton_softmax
from pallas_kernels.linear_cross_entropy.chunks import Limit
from pallas_kernels.nf4 import fused, pack, unpack
from pallas_kernels.nf4.products import Way
from pallas_kernels.swiglu import packed as swiglu
from pallas_kernels.tune.ops import OPS
from pallas_kernels.tune.search import Session, Tunable
from pallas_kernels.tuning import Entry, choice

command = importlib.import_module("pallas_kernels.tune.__main__")
KINDS = {  # of choices, by what an op's name begins with
    "decode_attention": decode.Tiles,
    "dequantize_nf4": unpack.Tiles,
    "flash_attention.after_mosaic": AfterMosaic,
    "flash_attention.mosaic": mosaic_common.Tiles,
    "flash_attention.triton": attention_triton.Tiles,
    "linear_cross_entropy.chunk": Limit,
    "linear_cross_entropy": triton_softmax.Tiles,
    "nf4_matmul.forward.tiles": fused.Tiles,
    "nf4_matmul.input_gradient.tiles": fused.Tiles,
    "nf4_matmul": Way,
    "swiglu": swiglu.Tiles,
}


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_of_the_package(path):
    """Every choice is one that its op can make, and the ops of that device find the file."""
    for (op, shape), fields in tuning.read(path).items():
        kind = next(kind for start, kind in KINDS.items() if op.startswith(start))
        tuning.build(kind, fields, f"{path}: {op} {shape}")
    assert tuning.path_of(json.loads(path.read_text())["device"]) == path


@dataclasses.dataclass(frozen=True)
class Width:
    width: int

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"{self.width=} must be even.")


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU of a kind that no table knows, with tables in a folder of their own."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "cuda_capability", lambda: (8, 9))
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA GeForce RTX 9090")
    tuning._table.cache_clear()
    yield tmp_path / "nvidia_geforce_rtx_9090.json"
    tuning._table.cache_clear()


def test_what_is_written_is_chosen(device):
    first = Entry("op", {"tokens": 16}, {"width": 4}, us=1.5, workload="tiny/o/16")
    made = {"date": "today", "note": "by hand"}
    tuning.write(device, "NVIDIA GeForce RTX 9090", [first, Entry("op", {}, {"width": 8})], made)
    again = dataclasses.replace(first, choice={"width": 6})
    tuning.write(device, "NVIDIA GeForce RTX 9090", [again], {"date": "later"})
    assert choice("op", Width(2), tokens=16) == Width(6)
    assert choice("op", Width(2)) == Width(8)
    assert choice("op", Width(2), tokens=32) == Width(2)
    record = json.loads(device.read_text())
    assert (record["date"], record["note"], len(record["choices"])) == ("later", "by hand", 2)
    assert [path.name for path in device.parent.iterdir()] == [device.name]  # nothing half-written stays


def test_a_wrong_table_is_named(device):
    tuning.write(device, "NVIDIA GeForce RTX 9090", [Entry("op", {}, {"width": 3})], {})
    with pytest.raises(ValueError, match=r"rtx_9090.json: op .*must be even.; run python -m pallas_kernels.tune"):
        choice("op", Width(2))


@pytest.mark.parametrize("content", ['{"choices": [{"op"', "[]", '{"choices": [{"op": "op"}]}'])
def test_a_damaged_table_is_named(content, device, monkeypatch, capsys):
    device.write_text(content)
    with pytest.raises(ValueError, match=r"rtx_9090.json is no table of choices .*; remove it"):
        choice("op", Width(2))
    monkeypatch.setattr(command, "triton_obstacle", lambda: None)
    assert command.main(["swiglu", "--out", str(device)]) == 2  # before anything is measured
    assert "cannot be written" in capsys.readouterr().err


def test_a_table_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "triton_obstacle", lambda: None)
    (tmp_path / "file").touch()
    assert command.main(["swiglu", "--out", str(tmp_path / "file" / "table.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_unknown_gpu_is_told_once(device, caplog):
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        assert [choice("op", Width(2)), choice("other", Width(4))] == [Width(2), Width(4)]
    (line,) = caplog.messages
    assert "NVIDIA GeForce RTX 9090" in line
    assert "python -m pallas_kernels.tune" in line


def test_a_machine_without_a_gpu_is_told_nothing(caplog):
    assert choice("op", Width(2)) == Width(2)
    assert not caplog.messages


def toy(default: Any = None, **changes: Any) -> Tunable:
    """x times the width that is in force: only 4 and 8 are right, 6 does not compile."""

    def run(x: jax.Array) -> jax.Array:
        width = choice("toy", Width(4), size=3).width
        if width == 6:
            raise RuntimeError("out of shared memory")
        return x * (4 if width == 8 else width)

    candidates = [{"width": width} for width in (2, 3, 6, 8)]
    tunable = Tunable(
        "toy", {"size": 3}, Width(4), candidates, lambda seed: (jnp.ones(8) + seed,), run, lambda x: 4 * x
    )
    return dataclasses.replace(tunable, **changes)


def timer(**seconds: float) -> Callable:
    def time(programs: dict) -> dict:
        for program in programs.values():
            program()
        return {candidate: seconds[f"w{candidate.width}"] for candidate in programs}

    return time


def test_the_fastest_that_is_right():
    log = []
    with Session(timer(w4=2e-6, w8=1e-6), log.append) as session:
        entry = session.tune(toy())
        assert choice("toy", Width(4), size=3) == Width(8)  # in force for what is tuned on top of it
    assert entry == Entry("toy", {"size": 3}, {"width": 8}, 1.0, 2.0)
    assert choice("toy", Width(4), size=3) == Width(4)
    said = "\n".join(log)
    for words in (
        "'width': 3} left out",
        "Width(width=2) left out: off by 0.5",
        "Width(width=6) left out: RuntimeError: out of",
    ):
        assert words in said


def test_the_default_stays_within_the_noise():
    with Session(timer(w4=1e-6, w8=0.99e-6), lambda _: None) as session:
        assert session.tune(toy()).choice == {"width": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"make": lambda seed: (jnp.zeros(8),)}, "reference of norm 0.0"),
        ({"reference": lambda x: x * jnp.nan}, "reference of norm nan"),
        ({"reference": lambda x: 5 * x}, "no candidate gave the right result"),
    ],
)
def test_nothing_is_tuned_on_what_proves_nothing(changes, words):
    with Session(timer(w4=1.0), lambda _: None) as session, pytest.raises(RuntimeError, match=words):
        session.tune(toy(**changes))


NAMES = {"flash_attention": "tiny/attention/1x64", "flash_attention_backward": "tiny/attention/1x64"}
NAMES |= {"linear_cross_entropy": "tiny/head/32", "decode_attention": "tiny/attention/2x64"}


@pytest.mark.parametrize("op", OPS)
def test_candidates_of_an_op(op, monkeypatch):
    """What is run has the shapes of its reference, whichever candidate is in force: as on a GPU, but for the kernels."""

    def traced(kernel, *arrays, out, **constants):
        return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), out)

    monkeypatch.setattr(triton_call, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(triton_call, "_installed", lambda: True)
    for module in (attention_triton, decode, fused, pack, swiglu, triton_softmax, unpack):
        monkeypatch.setattr(module, "triton_call", traced)
    tunables, workloads = OPS[op]
    assert workloads
    for tunable in tunables(NAMES.get(op, "tiny/gate_up/32")):
        choices = tunable.choices(pytest.fail)  # none that its class refuses
        assert len(choices) > 1
        arguments = jax.eval_shape(tunable.make, 0)
        expected = jax.eval_shape(tunable.reference, *arguments)
        jax.clear_caches()
        with tuning.trying(tunable.op, choices[-1], **tunable.shape):
            got = jax.eval_shape(tunable.run, *arguments)
        assert jax.tree.map(lambda leaf: leaf.shape, got) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_the_command_says_what_is_wrong(capsys):
    assert command.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    for arguments, words in (
        (["conv"], "nothing to tune in conv"),
        (["--shapes", "tiny/o/4"], "--shapes are those of one OP"),
        (["nf4_matmul", "--shapes", "tiny/o"], "no workload 'tiny/o'"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert words in capsys.readouterr().err


def test_the_command_keeps_what_it_measured(device, monkeypatch, capsys):
    """One workload that fails costs no other."""

    def tunables(name):
        if name == "tiny/o/16":
            raise ValueError("does not fit")
        yield toy()

    monkeypatch.setattr(command, "triton_obstacle", lambda: None)
    monkeypatch.setattr(command, "device_kind", lambda: "NVIDIA GeForce RTX 9090")
    monkeypatch.setattr(command, "path_of", tuning.path_of)
    monkeypatch.setattr(command, "in_turns", timer(w4=2e-6, w8=1e-6))
    monkeypatch.setitem(OPS, "toy", (tunables, ()))
    assert command.main(["toy", "--shapes", "tiny/o/16", "tiny/o/32"]) == 1
    assert "failed: toy tiny/o/16" in capsys.readouterr().out
    assert choice("toy", Width(4), size=3) == Width(8)
