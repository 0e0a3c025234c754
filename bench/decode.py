"""Generation: tokens per second once prompts are read, and how long a prompt takes.

    python -m bench.decode --shape llama3.1-8b --batch 1 --prompt 128 --new 256 [--out decode.json]

Weights are random, packed on the device, with LoRA of rank 16 on all projections; the limit is the time that a copy of the
packed weights, the head and the cache would take. Programs are compiled before anything is timed.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.record import print_row
from bench.workloads import SHAPES, random_packed_model
from fastjax.generate import Engine, Request
from fastjax.lora import LoraConfig, add_lora
from fastjax.models import Llama
from fastjax.train.memory import tree_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="tokens between two looks of the host")
    parser.add_argument("--copy", type=float, default=4.0, help="TB/s that the device copies, for the limit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print_row(measure(arguments), arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = random_packed_model(SHAPES[arguments.shape])
    add_lora(model, LoraConfig.create(r=16, lora_alpha=16))
    engine = Engine(model, arguments.batch)
    prompts = (
        np.random.default_rng(0).integers(3, model.config.vocab_size, (arguments.batch, arguments.prompt)).tolist()
    )

    def run(new: int, steps: int) -> float:
        """Seconds for `new` tokens of each prompt."""
        began = time.perf_counter()
        *_, completions = engine.run([Request(prompt, new) for prompt in prompts], steps)
        assert all(len(completion.tokens) == new for completion in completions)
        return time.perf_counter() - began

    began = time.perf_counter()
    run(arguments.new, arguments.steps)
    first = time.perf_counter() - began
    run(1, 1)
    to_first = min(run(1, 1) for _ in range(3))
    whole = min(run(arguments.new, arguments.steps) for _ in range(3))
    rate = arguments.batch * (arguments.new - 1) / (whole - to_first)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "peer": "fastjax",
        "bs": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "tok_s": round(rate, 1),
        "first_token_ms": round(to_first * 1e3, 1),
        "first_run_s": round(first, 1),
        "peak_GiB": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
        "fraction_of_limit": round(rate / arguments.batch * read_bytes(model, arguments) / (arguments.copy * 1e12), 3),
    }


def read_bytes(model: Llama, arguments: argparse.Namespace) -> float:
    """What a step must read at the middle of the text: all weights but the embedding's, and keys and values."""
    config = model.config
    weights = tree_bytes(nnx.state(model.layers)) + tree_bytes(model.head_weight())
    positions = arguments.prompt + arguments.new / 2
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    return weights + arguments.batch * positions * row


if __name__ == "__main__":
    main()
