"""A checkpoint on disk to packed weights on the device: seconds, and host memory above what the process had before.

    python -m bench.loading --checkpoint /tmp/llama [--shape llama3.1-8b] [--out loading.json]

Makes the checkpoint if it is not there, so that its files are in the page cache. The first load compiles its programs,
the second finds them compiled. Beside them what bounds a load: the files read alone, as the loader reads them, and as many
bytes sent to the device alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.record import print_row
from bench.whole_path import host_peak_gib, timed
from bench.workloads import SHAPES, write_random_checkpoint
from fastjax import FastLanguageModel
from fastjax.weights.checkpoint import find_tensors
from fastjax.weights.load import read_ahead
from fastjax.weights.safetensors_file import read_rows
from fastjax.weights.transfer import PIECE_BYTES, pieces_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.checkpoint.is_dir():
        write_random_checkpoint(arguments.checkpoint, SHAPES[arguments.shape])
    size = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    jax.numpy.zeros(()).block_until_ready()  # the device's runtime is not the loader's
    before, loads = host_peak_gib(), []
    for _ in range(2):
        (model, _), seconds = timed(FastLanguageModel.from_pretrained, arguments.checkpoint)
        loads.append({"seconds": seconds, "host_GiB_above_baseline": round(host_peak_gib() - before, 2)})
        del model
    row = {
        "shape": arguments.shape,
        "checkpoint_GB": round(size / 1e9, 2),
        "loads": loads,
        "read_alone_s": seconds_of(lambda: read_all(arguments.checkpoint)),
        "send_alone_s": seconds_of(lambda: send(size)),
    }
    print_row(row, arguments.out)


def read_all(checkpoint: Path) -> None:
    def job(info: Any, start: int, stop: int) -> Callable[[], int]:
        return lambda: read_rows(info, start, stop).nbytes

    jobs = [job(info, *rows) for info in find_tensors(checkpoint).values() for rows in pieces_of(info, None)]
    sum(read_ahead(jobs))


def send(size: int) -> None:
    """Pieces of random bytes, two on their way at a time, as many as make up `size`."""
    pieces = [np.random.default_rng(i).integers(0, 255, PIECE_BYTES, np.uint8) for i in range(8)]
    before = None
    for number in range(size // PIECE_BYTES):
        sent = jax.device_put(pieces[number % 8])
        jax.block_until_ready(before)
        before = sent


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 2)


if __name__ == "__main__":
    main()
