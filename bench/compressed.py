"""What gradients sent as codes do to a real training run, what they send, and how long it takes.

    python -m bench.compressed --loss [--seeds 3] [--steps 300] [--out FILE]       on eight devices, virtual ones on a CPU
    python -m bench.compressed --seconds [--values 41943040] [--out FILE]          on all GPUs of a host

`--loss` trains all weights of a small Llama from scratch on the standard library's sources, a model for each seed and each
way of summing gradients over eight devices, and compares their losses on text held out. "owing nothing" is 4 bits without
error feedback. `--seconds` sums vectors as long as the gradients of LoRA r=16 on Llama-3.1-8B, again and again in one
program.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from bench.data import documents
from bench.record import print_row
from fastjax import init_train_state, make_mesh, make_train_step
from fastjax.data import DataOptions, Rows, batch_at, in_order, pack, tokenize_dataset
from fastjax.demo.tokenizer import train_tokenizer
from fastjax.models import Llama, LlamaConfig, init_weights
from fastjax.parallel import compressed
from fastjax.parallel.hosts import onto_mesh, place_batch
from fastjax.parallel.traffic import sent_bytes
from fastjax.train.loss import causal_lm_loss
from fastjax.train.optimizers import make_optimizer
from fastjax.train.schedules import make_schedule

DEVICES, ROW, BATCH, HELD_OUT = 8, 64, 32, 100
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    initializer_range=0.05,  # the usual 0.02 takes a model this small long to get off
)
RUNS = {"full": "full", "8bit": "8bit", "4bit": "4bit", "4bit, owing nothing": "4bit"}


def rows_of_text() -> tuple[Rows, Rows]:
    """To train on, and held out."""
    texts = [text[:1500] for text in documents()[::3]]
    tokenizer = train_tokenizer(texts, CONFIG.vocab_size)

    def rows(texts: list[str]) -> Rows:
        options = DataOptions(overlong="split")
        return pack(
            tokenize_dataset([{"text": text} for text in texts], tokenizer, max_length=ROW, options=options), ROW
        )

    return rows(texts[HELD_OUT:]), rows(texts[:HELD_OUT])


def fresh_model(seed: int, mesh: Mesh) -> Llama:
    model = Llama(CONFIG, init_weights(CONFIG, jax.random.key(seed)), dtype=jnp.dtype(jnp.float32), trainable=True)
    definition, state = nnx.split(model)
    return nnx.merge(definition, onto_mesh(state, mesh))


def train_seeds(run: str, seeds: int, steps: int, rows: Rows, mesh: Mesh) -> Iterator[tuple[nnx.State, float]]:
    """Trained parameters of each seed, and the bytes a device sends in a step. One program serves all seeds."""
    schedule = make_schedule("cosine", 6e-3, warmup_ratio=0.05, total_steps=steps)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.01)
    step = make_train_step(fresh_model(0, mesh), optimizer, mesh, gradient_reduction=RUNS[run])
    for seed in range(seeds):
        state = init_train_state(fresh_model(seed, mesh), optimizer, seed=seed, gradient_reduction=RUNS[run])
        nothing = jax.tree.map(np.zeros_like, state.owed) if "nothing" in run else None
        sent = sent_bytes(step.trace(state, batch_of(rows, 0, seed, mesh)).jaxpr)
        for number in range(steps):
            state, metrics = step(state, batch_of(rows, number, seed, mesh))
            float(metrics["loss"])  # virtual devices that run ahead may end up waiting for each other's threads
            if nothing is not None:
                owed = jax.tree.map(lambda zeros, old: jax.device_put(zeros, old.sharding), nothing, state.owed)
                state = dataclasses.replace(state, owed=owed)
        yield state.params, sent


def batch_of(rows: Rows, step: int, seed: int, mesh: Mesh) -> dict[str, Any]:
    return place_batch(batch_at(rows, step, batch_size=BATCH, seed=seed), mesh, BATCH)


def held_out_loss(params: nnx.State, definition: nnx.GraphDef, rows: Rows, loss: Callable) -> float:
    """A token's, on one device."""
    params = jax.tree.map(np.asarray, params)
    sums = [jax.device_get(loss(definition, params, batch)) for batch in in_order(rows, 256)]
    total, tokens = np.sum(sums, axis=0)
    return float(total / tokens)


def measure_loss(seeds: int, steps: int) -> dict[str, Any]:
    rows, held_out = rows_of_text()
    mesh, began = make_mesh(data=DEVICES), time.perf_counter()
    definition = nnx.graphdef(fresh_model(0, mesh))
    loss = jax.jit(lambda d, params, batch: causal_lm_loss(nnx.merge(d, params), batch), static_argnums=0)
    losses: dict[str, list[float]] = {run: [] for run in RUNS}
    sent, size = {}, 0
    for run in RUNS:
        for seed, (params, bytes_sent) in enumerate(train_seeds(run, seeds, steps, rows, mesh)):
            size, sent[run] = sum(leaf.size for leaf in jax.tree.leaves(params)), bytes_sent
            losses[run].append(held_out_loss(params, definition, held_out, loss))
            print(
                f"{run:<20} seed {seed}  loss {losses[run][-1]:.4f}  {time.perf_counter() - began:4.0f} s", flush=True
            )
    half = 2 * (DEVICES - 1) / DEVICES * 2 * size  # an all-reduce of bfloat16
    full = np.array(losses["full"])
    return {
        "what": "loss",
        "parameters": size,
        "steps": steps,
        "tokens_a_step": BATCH * ROW,
        "held_out_loss": {run: [round(each, 5) for each in found] for run, found in losses.items()},
        "worse_by": {run: [round(each, 5) for each in (found / full - 1).tolist()] for run, found in losses.items()},
        "sent_of_bfloat16": {run: round(each / half, 4) for run, each in sent.items()},
    }


def measure_seconds(values: int, times: int = 20) -> dict[str, Any]:
    devices = jax.device_count()
    mesh = make_mesh(data=devices)
    rows = compressed.per_device(mesh)
    over = partial(jax.shard_map, mesh=mesh, check_vma=False)
    x = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (devices, values)), out_shardings=NamedSharding(mesh, rows)
    )()
    owed = compressed.nothing_owed(values, devices, mesh)

    def in_full(dtype: Any) -> Callable:
        def one(x: jax.Array, owed: Any) -> tuple[jax.Array, Any]:
            return jax.lax.psum(x.astype(dtype), ("data",)).astype(jnp.float32) / devices, owed

        return one

    def coded(bits: int) -> Callable:
        def one(x: jax.Array, owed: Any) -> tuple[jax.Array, Any]:
            total, owed = compressed.sum_tree(x[0], owed, jnp.float32(1), ("data", "fsdp"), bits)
            return total[None] / devices, owed

        return one

    sums = {"float32": in_full(jnp.float32), "bfloat16": in_full(jnp.bfloat16), "8bit": coded(8), "4bit": coded(4)}
    seconds, sent = {}, {}
    for name, one in sums.items():
        once = over(one, in_specs=(rows, rows), out_specs=(rows, rows))
        sent[name] = sent_bytes(jax.make_jaxpr(once)(x, owed))
        loop = jax.jit(lambda x, owed, once=once: jax.lax.fori_loop(0, times, lambda _, c: once(*c), (x, owed)))
        jax.block_until_ready(loop(x, owed))
        began = time.perf_counter()
        jax.block_until_ready(loop(x, owed))
        seconds[name] = round((time.perf_counter() - began) / times, 6)
    return {"what": "seconds", "devices": devices, "values": values, "seconds_a_sum": seconds, "sent_bytes": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--loss", action="store_true")
    what.add_argument("--seconds", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--values", type=int, default=41_943_040)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    row = measure_loss(options.seeds, options.steps) if options.loss else measure_seconds(options.values)
    print_row(row, options.out)


if __name__ == "__main__":
    main()
