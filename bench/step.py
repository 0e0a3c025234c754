"""The training step alone: tokens per second, peak memory, compile time, and the fraction of the card's own limit.

    python -m bench.step --checkpoint /tmp/llama --batch 8 --seq 2048 --policy none [--out step.json]

One JSON line. The limit counts only the matrix products that must be done, at the rate a plain bf16 product reaches on
the same card in the same run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import write_record
from fastjax import FastLanguageModel, init_train_state, make_train_step
from fastjax.models import LlamaConfig, param_specs
from fastjax.train.optimizers import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result), flush=True)
    if arguments.out:
        write_record(arguments.out, result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, _ = FastLanguageModel.from_pretrained(arguments.checkpoint, progress=False)
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    optimizer = make_optimizer("adamw_8bit", learning_rate=2e-4)
    state = init_train_state(model, optimizer)
    step = make_train_step(model, optimizer, gradient_checkpointing=arguments.policy)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (arguments.batch, arguments.seq))
    batch = {"input_ids": jnp.asarray(ids, jnp.int32), "labels": jnp.asarray(ids, jnp.int32)}
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    first = time.perf_counter() - began
    state, metrics = jax.block_until_ready(step(state, batch))
    began = time.perf_counter()
    for _ in range(arguments.steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / arguments.steps
    stats = jax.local_devices()[0].memory_stats() or {}
    tokens = arguments.batch * arguments.seq
    rate = matmul_rate()
    recomputed = arguments.policy == "full"
    return {
        "peer": "fastjax",
        "bs": arguments.batch,
        "seq": arguments.seq,
        "policy": arguments.policy,
        "tok_s": round(tokens / seconds),
        "step_s": round(seconds, 4),
        "peak_GiB": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
        "first_step_s": round(first, 1),
        "loss": round(float(metrics["loss"]), 3),
        "matmul_tflops": round(rate / 1e12),
        "fraction_of_limit": round(
            tokens * flops_per_token(model.config, arguments.seq, recomputed) / rate / seconds, 3
        ),
    }


def flops_per_token(config: LlamaConfig, length: int, recomputed: bool) -> float:
    """Forward and input-gradient products of the frozen weights, causal attention; the forward twice if recomputed."""
    specs = param_specs(config).values()
    projections = sum(spec.layers * spec.shape[0] * spec.shape[1] for spec in specs if spec.quantize and spec.layers)
    head = config.vocab_size * config.hidden_size
    attention = (
        2 * config.num_layers * config.num_heads * config.head_dim * length
    )  # forward, causal half of the square
    forward = 2 * projections + attention
    backward = 2 * projections + 2.5 * attention
    return forward + backward + 4 * head + (forward if recomputed else 0)


def matmul_rate(size: int = 8192, repeats: int = 10) -> float:
    """Flops per second of a square bf16 product on random data."""
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    multiply(x, y).block_until_ready()
    began = time.perf_counter()
    for _ in range(repeats):
        product = multiply(x, y)
    product.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
