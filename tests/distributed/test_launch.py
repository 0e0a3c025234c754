"""Processes started and watched together, played by scripts of a line or two."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjax.cli import main
from fastjax.distributed import launch as launching
from fastjax.distributed.launch import ProcessFailed, launch, split_devices, visible_devices
from fastjax.errors import UserError

START = "import os, signal, sys, time; index = int(sys.argv[-1]); "


def run(script: str, logs: Path, processes: int = 2) -> int:
    return launch([sys.executable, "-c", START + script], processes, logs, {})


def test_each_is_told_which_it_is_and_the_first_has_the_terminal(tmp_path, capfd):
    assert run("print(*sys.argv[1:])", tmp_path / "logs", processes=3) == 0
    said, complaints = capfd.readouterr()
    words = said.split()
    assert words[0] == "--coordinator"
    assert words[2:] == ["--processes", "3", "--process", "0"]
    assert complaints == ""
    for index in (1, 2):
        assert (tmp_path / "logs" / f"process-{index}.log").read_text().split() == [*words[:-1], str(index)]
    assert not (tmp_path / "logs" / "process-0.log").exists()


def test_one_that_fails_ends_the_others_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE_S", 0.2)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); index or time.sleep(60); "
    began = time.monotonic()
    with pytest.raises(
        ProcessFailed, match=r"process 1 of 2 ended with exit code 7; the others were ended too$"
    ) as told:
        run(deaf + "print('no such thing'); sys.exit(7)", tmp_path)
    assert told.value.exit_code == 7
    assert told.value.last_words == f"the end of {tmp_path / 'process-1.log'}:\n  no such thing\n"
    with pytest.raises(
        ProcessFailed, match=r"process 1 of 2 was killed by SIGKILL; the others were ended too$"
    ) as told:
        run(deaf + "print('still well', flush=True); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert told.value.exit_code == 128 + signal.SIGKILL
    assert not told.value.last_words
    assert time.monotonic() - began < 30


def test_of_several_that_failed_the_killed_one_is_named(tmp_path, monkeypatch):
    """Also when it is seen after those that failed for it."""
    monkeypatch.setattr(launching, "POLL_S", 0.05)
    with pytest.raises(ProcessFailed, match="process 1 of 2 was killed by SIGKILL"):
        run("index and (time.sleep(0.5), os.kill(os.getpid(), signal.SIGKILL)); sys.exit(1)", tmp_path)


def test_one_that_hangs_is_named(tmp_path, monkeypatch):
    """As JAX aborts the others when it hears no more of one."""
    monkeypatch.setattr(launching, "GRACE_S", 0.2)
    with pytest.raises(ProcessFailed, match="process 1 of 2 did not answer any more; the others were ended too"):
        run("index and time.sleep(60); os.abort()", tmp_path)


def test_of_several_that_failed_the_first_is_named(tmp_path, monkeypatch):
    """Also when the others fail for it in the next moment, before anyone looks."""
    monkeypatch.setattr(launching, "POLL_S", 0.3)
    flag = f"flag = {str(tmp_path / 'flag')!r}\n"
    wait = "while not (index or os.path.exists(flag)): time.sleep(0.002)\n"
    then = "index and open(flag, 'w').close()\nindex or time.sleep(0.02)\nos._exit(3 + index)"
    with pytest.raises(ProcessFailed, match="process 1 of 2 ended with exit code 4"):
        run(f"\n{flag}{wait}{then}", tmp_path)


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_its_code_returned(tmp_path, received):
    inner = f"signal.signal({received}, lambda *_: sys.exit({128 + received})); print('up', flush=True); time.sleep(60)"
    script = (
        "import sys; from pathlib import Path; from fastjax.distributed.launch import launch\n"
        f"sys.exit(launch([sys.executable, '-c', {START + inner!r}], 2, Path({str(tmp_path)!r}), {{}}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    log = tmp_path / "process-1.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    launcher.send_signal(received)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + received


def test_gpus_are_divided(tmp_path):
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "tty0"):
        (tmp_path / name).touch()
    assert visible_devices({}, tmp_path) == ["0", "2", "10"]
    assert visible_devices({}, tmp_path / "absent") == []
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-a,3"}, tmp_path) == ["GPU-a", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert split_devices(["4", "5", "6", "7"], 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert split_devices([], 2) == [{}, {}]
    with pytest.raises(UserError, match="3 GPUs do not split over --processes 2"):
        split_devices(["0", "1", "2"], 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2", "plan", "x.yaml"], "runs `train CONFIG.yaml ...`, not 'plan x.yaml'"),
        (["--processes", "2"], "not 'nothing'"),
        (["--processes", "0", "train", "x.yaml"], "--processes 0 must be at least 1"),
        (["--processes", "2", "--", "train", "absent.yaml"], "'absent.yaml' cannot be read"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words, said, capsys):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
