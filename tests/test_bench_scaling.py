"""Each mesh is measured once, by bench.step in a process of its own, and compared with one GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import scaling
from bench.record import append_record
from bench.step import mesh_sizes


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started; each records a row, as bench.step would, but fsdp=4, which fails."""
    commands: list[list[str]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        del check
        commands.append(command)
        mesh = mesh_sizes(command[command.index("--mesh") + 1]) if "--mesh" in command else {}
        devices = len(env["CUDA_VISIBLE_DEVICES"].split(","))
        if mesh == {"fsdp": 4}:
            return SimpleNamespace(returncode=1)
        monkeypatch.setattr("sys.orig_argv", command)
        row = {"mesh": mesh, "devices": devices, "tok_s": 100 * devices - devices**2}
        row |= {"fraction_of_limit": 0.8, "peak_GiB": 1.0, "held_GiB": 0.5}
        append_record(command[command.index("--out") + 1], row)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("FASTJAX_COMMIT", "one")
    return commands


def test_every_mesh_has_its_row(
    started: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "scaling.json"
    meshes = ["data=2", "data=2,context=2", "fsdp=4"]
    monkeypatch.setattr(sys, "argv", ["scaling", "--meshes", *meshes, "--batch", "4", "--out", str(out)])
    scaling.main()
    rows = scaling.recorded(out)
    assert [(row["mesh"], row["devices"]) for row in rows] == [
        ({}, 1),
        ({"data": 2}, 2),
        ({"data": 2, "context": 2}, 4),
    ]
    assert [command[command.index("--batch") + 1] for command in started] == ["4", "8", "8", "16"]
    assert [command[command.index("--seq") + 1] for command in started] == ["2048", "2048", "4096", "2048"]
    text = capsys.readouterr()
    assert "data 2, context 2" in text.out
    assert "0.970" in text.out  # 96 of 99
    assert "fsdp=4: not measured" in text.err
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    started.clear()
    scaling.main()  # what failed is tried again, nothing else
    assert [command[-1] for command in started] == ["fsdp=4"]


def test_a_model_that_one_gpu_cannot_hold(
    started: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "--no-alone",
        "--shape",
        "llama3.1-405b",
        "--meshes",
        "fsdp=2",
        "--out",
        str(tmp_path / "scaling.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    scaling.main()
    assert [command[command.index("--mesh") + 1] for command in started] == ["fsdp=2"]
    assert "fsdp 2" in capsys.readouterr().out
