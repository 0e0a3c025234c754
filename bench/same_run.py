"""Whether one YAML gives the same losses on one GPU, on all of a host, and in processes that share them.

    python -m bench.same_run [--processes 2] [--out same_run.json]

A tiny Llama with packed weights, made here, is trained by `fastjax train` on one GPU, on all of them with `mesh.fsdp`, and by
`fastjax launch` with an equal share of the GPUs for each process. What differs is the mesh, and with it how many micro-batches
make up the same rows a step. Losses must agree to the rounding of bfloat16 sums.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import write_record
from bench.workloads import SHAPES, standard_library_texts, write_random_checkpoint
from fastjax.distributed.launch import visible_devices
from fastjax.train.metrics import read_metrics

ROWS = 2  # of a device, at once
CHARACTERS = 1500  # of a text
NEAR = 1e-3  # relative, of a step's loss
CONFIG = """
model: {{model_name: {directory}/base, max_seq_length: 256}}
lora: {{r: 16, lora_alpha: 16}}
data: {{path: {directory}/data.jsonl}}
train:
  output_dir: {directory}/unused
  max_steps: {steps}
  per_device_train_batch_size: {rows}
  packing: true
  logging_steps: 1
  save_steps: 12
  learning_rate: 5e-3
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpus = visible_devices(os.environ)
    if len(gpus) < 2 or len(gpus) % options.processes:
        raise SystemExit(f"found {len(gpus)} GPUs: there must be two or more, and a multiple of {options.processes=}.")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPUs are those of the processes started here
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory), gpus, options.processes, options.steps)
    print(json.dumps({key: value for key, value in results.items() if key != "losses"}))
    if options.out:
        write_record(options.out, results)
    if results["largest_relative_difference"] > NEAR:
        raise SystemExit("the losses differ")


def measure(directory: Path, gpus: list[str], processes: int, steps: int) -> dict:
    config, count = write_run(directory, steps), len(gpus)
    mesh = [f"mesh.fsdp={count}", "train.gradient_accumulation_steps=1"]
    runs = {
        "one GPU": (gpus[:1], [], [f"train.gradient_accumulation_steps={count}"]),
        f"{count} GPUs": (gpus, [], mesh),
        f"{processes} processes": (gpus, ["launch", "--processes", str(processes), "--"], mesh),
    }
    losses, seconds = {}, {}
    for name, (visible, words, settings) in runs.items():
        began, output = time.perf_counter(), directory / name.replace(" ", "_")
        command = [
            sys.executable,
            "-m",
            "fastjax",
            *words,
            "train",
            str(config),
            f"train.output_dir={output}",
            *settings,
        ]
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-3000:]}")
        losses[name] = [record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record]
        seconds[name] = round(time.perf_counter() - began, 1)
    alone, *others = losses.values()
    apart = [abs(loss - right) / right for each in others for loss, right in zip(each, alone, strict=True)]
    return {"largest_relative_difference": max(apart), "seconds": seconds, "losses": losses}


def write_run(directory: Path, steps: int) -> Path:
    """A tiny model, texts, and the YAML that names them."""
    write_random_checkpoint(directory / "base", SHAPES["tiny"])
    text = "".join(standard_library_texts(400_000))
    pieces = [{"text": text[start : start + CHARACTERS]} for start in range(0, len(text), CHARACTERS)]
    (directory / "data.jsonl").write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    path = directory / "run.yaml"
    path.write_text(CONFIG.format(directory=directory, steps=steps, rows=ROWS))
    return path


if __name__ == "__main__":
    main()
