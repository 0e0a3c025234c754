"""Loading a 2 GB checkpoint takes less host memory than three times its largest tensor.

A process of its own loads it and reports the peak of its resident memory. On the CPU device memory is host memory too,
so what the loaded parameters themselves take is left out of account; all else counts, the tensor that is being packed
and the compiler included.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastjax.models import LlamaConfig, param_specs
from fastjax.weights.save import ExportTensor, save_weights

CONFIG = {
    "vocab_size": 16384,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 4,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
LOADER = """
import json, sys
import jax
from fastjax.models import LlamaConfig, param_specs
from fastjax.weights.load import load_weights

directory, config = sys.argv[1], LlamaConfig(**json.loads(sys.argv[2]))
def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

jax.numpy.zeros(()).block_until_ready()
before = memory("VmRSS")
weights = load_weights(directory, param_specs(config), load_in_4bit=True, dtype="bfloat16", progress=False)
jax.block_until_ready(weights)
kept = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
print(json.dumps({"before": before, "peak": memory("VmHWM"), "kept": kept}))
"""


def write_checkpoint(directory: Path, config: LlamaConfig) -> tuple[int, int]:
    """Random values, the same ones in every tensor; returns the bytes of all and of the largest."""
    specs = param_specs(config)
    noise = np.random.default_rng(0).standard_normal(max(math.prod(s.shape) for s in specs.values()), np.float32)
    noise = noise.astype(ml_dtypes.bfloat16)
    tensors = [
        ExportTensor.of(name, noise[: math.prod(spec.shape)].reshape(spec.shape))
        for spec in specs.values()
        for name in spec.hf_names()
    ]
    save_weights(directory, tensors, max_shard_bytes=500 << 20)
    return sum(tensor.nbytes for tensor in tensors), noise.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for the peak of a process")
def test_peak_of_host_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the files may stay in the page cache
    total, largest = write_checkpoint(tmp_path, LlamaConfig(**CONFIG))
    assert total > 2e9
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device
        # what is freed goes back to the system at once: without it glibc keeps up to 60 MB per thread of XLA's pool,
        # and the figure would depend on the number of cores
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    command = [sys.executable, "-c", LOADER, str(tmp_path), json.dumps(CONFIG)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kept"] < 0.4 * total  # it did pack
    excess = report["peak"] - report["before"] - report["kept"]
    assert 0 < excess < 3 * largest, f"{excess / largest:.2f} times the largest tensor"
