"""Two real processes, talking over gloo, end a run as one process does; a dead one ends the job; restarts go on.

The runs are those of bench.kill_resume: a tiny model from a file, packed rows, LoRA with dropout, here by plain SGD, whose
updates do not magnify the last bit of a sum that was taken in another order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from bench.kill_resume import write_run
from fastjax.train.checkpoints import list_checkpoints
from fastjax.train.metrics import read_metrics
from tests.lightly import environment

STEPS = 36
SETTINGS = [
    "train.optim=sgd",
    "train.learning_rate=0.1",
    "train.save_steps=6",
    "train.save_total_limit=20",
    f"train.max_steps={STEPS}",
    "train.eval_steps=18",
]
LAUNCH = ["launch", "--processes", "2", "--"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), STEPS)


def started(config: Path, output_dir: Path, words: list[str], devices: int, *settings: str) -> subprocess.Popen:
    """`fastjax ... train` with so many virtual devices in each process."""
    command = [sys.executable, "-m", "fastjax", *words, "train", str(config), f"train.output_dir={output_dir}"]
    command += [f"data.eval_path={config.parent / 'data.jsonl'}", *SETTINGS, *settings]
    environ = os.environ | environment(config.parent, devices)
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> str:
    """What it said; it must have ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The processes it has started, in order."""
    children = [child for child in psutil.Process(launcher.pid).children() if "--process" in child.cmdline()]
    return sorted(children, key=lambda child: int(child.cmdline()[-1]))


def when(condition: Callable[[], bool], launcher: subprocess.Popen) -> None:
    """Waits for it, as long as the launcher is there."""
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.002)


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses, evaluations and adapter, to the rounding of sums taken in another order."""
    for name in ("loss", "eval_loss", "num_tokens"):
        values = [
            [record[name] for record in read_metrics(d / "metrics.jsonl") if name in record] for d in (one, other)
        ]
        np.testing.assert_allclose(*values, rtol=1e-5)
    adapters = [load_file(directory / "adapter_model.safetensors") for directory in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, values in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], values, rtol=1e-5, atol=1e-5 * np.abs(values).max())


@pytest.fixture(scope="module")
def one(config) -> Path:
    """Where one process with two devices has left its run; over which axis its batches are split changes nothing."""
    output_dir = config.parent / "one"
    finished(started(config, output_dir, [], 2, "mesh.data=2"))
    return output_dir


def test_data_parallel_equals_one_process(config, one, tmp_path):
    output = finished(started(config, tmp_path, LAUNCH, 1, "mesh.data=2"))
    assert_same_run(one, tmp_path)
    # one process wrote: each step once, each line once
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert steps == sorted(set(steps))
    assert output.count(f"step {STEPS}/{STEPS}  loss") == 1
    silent = (tmp_path / "processes" / "process-1.log").read_text()
    assert not any(word in silent for word in ("loss", "saved", "loading", "data:"))
    # one process read the data
    assert {path.name for path in (tmp_path / "processes").glob("*.safetensors")} == {
        "train_dataset.safetensors",
        "eval_dataset.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"processes", *(path.name for path in one.iterdir())}


def test_fsdp_stopped_and_killed_and_resumed_equals_one_process(config, one, tmp_path):
    two, settings = tmp_path / "two", ["mesh.fsdp=2"]

    # a scheduler's signal to one process stops all of them at the same step, with a checkpoint
    run = started(config, two, LAUNCH, 1, *settings)
    when(lambda: bool(read_metrics(two / "metrics.jsonl")), run)
    workers(run)[1].send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    stopped = list_checkpoints(two)[-1]

    # a process that dies ends the job, which says so
    run = started(config, two, LAUNCH, 1, *settings, "train.resume_from_checkpoint=true")
    when(lambda: list_checkpoints(two)[-1] != stopped, run)
    workers(run)[1].kill()
    began = time.monotonic()
    output, _ = run.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert run.returncode == 128 + signal.SIGKILL
    assert output.endswith("fastjax: process 1 of 2 was killed by SIGKILL; the others were ended too\n")
    assert not (two / "adapter_model.safetensors").exists()
    killed = list_checkpoints(two)[-1]
    assert json.loads((killed / "trainer_state.json").read_text())["step"] < STEPS

    output = finished(started(config, two, LAUNCH, 1, *settings, "train.resume_from_checkpoint=true"))
    assert f"resuming from {killed}" in output
    assert_same_run(one, two)
