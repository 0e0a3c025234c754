"""Generation: tokens per second once prompts are read, and how long a prompt takes.

    python -m bench.decode --shape llama3.1-8b --batch 1 --prompt 128 --new 256 [--out decode.json]
    python -m bench.decode --batch 8 --prompt 32768 --new 128 --random-cache --kv float8_e4m3fn
    python -m bench.decode --batch 8 --mesh tensor=2

Weights are random, packed on the device, with LoRA of rank 16 on all projections; the limit is the time that a copy of the
packed weights, the head and the cache would take, on a mesh of what each device has of them. Programs are compiled before
anything is timed. `--random-cache` reads no prompts: the cache is filled with random keys and values, as long prompts would
take minutes and teach nothing here.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.record import print_row
from bench.step import mesh_sizes
from bench.workloads import SHAPES, random_packed_model
from fastjax.generate import Engine, Request
from fastjax.generate.cache import EIGHT_BITS, SMALLEST, KVCache
from fastjax.generate.engine import GREEDY, Slots
from fastjax.lora import LoraConfig, add_lora
from fastjax.models import Llama
from fastjax.parallel.mesh import make_mesh
from fastjax.train.memory import tree_bytes
from pallas_kernels.decode_attention import KVStack, append


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64, help="tokens between two looks of the host")
    parser.add_argument("--kv", choices=EIGHT_BITS, help="store keys and values in 8 bits")
    parser.add_argument("--random-cache", action="store_true", help="fill the cache instead of reading prompts")
    parser.add_argument("--mesh", type=mesh_sizes, default={}, help="such as data=2,tensor=2")
    parser.add_argument("--copy", type=float, default=4.0, help="TB/s that the device copies, for the limit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.mesh and arguments.random_cache:
        parser.error("--random-cache fills one device's cache: leave out --mesh.")
    print_row(measure(arguments), arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    mesh = make_mesh(**arguments.mesh) if arguments.mesh else None
    model = random_packed_model(SHAPES[arguments.shape], mesh=mesh)
    add_lora(model, LoraConfig.create(r=16, lora_alpha=16))
    engine = Engine(model, arguments.batch, arguments.kv)
    timed = time_filled(engine, arguments) if arguments.random_cache else time_requests(engine, arguments)
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = arguments.copy * 1e12 / read_bytes(model, engine, arguments) * arguments.batch
    return {
        "peer": "fastjax",
        "bs": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "kv": engine.stored.name,
        "random_cache": arguments.random_cache,
        "mesh": arguments.mesh,
        **timed,
        "peak_GiB": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
        "fraction_of_limit": round(timed["tok_s"] / limit, 3),
    }


def time_requests(engine: Engine, arguments: argparse.Namespace) -> dict[str, float]:
    """Prompts read and continued, as a user's are."""
    vocabulary = engine.config.vocab_size
    prompts = np.random.default_rng(0).integers(3, vocabulary, (arguments.batch, arguments.prompt)).tolist()

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
    return {"tok_s": round(rate, 1), "first_token_ms": round(to_first * 1e3, 1), "first_run_s": round(first, 1)}


def time_filled(engine: Engine, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens after random keys and values for each of the prompts' positions."""
    slots = filled_slots(engine, arguments)

    def run(slots: Slots) -> tuple[Slots, float]:
        """All tokens of each row, and the seconds that they took."""
        began = time.perf_counter()
        for _ in range(arguments.new // arguments.steps):
            slots, tokens = engine.decode(slots, [GREEDY] * arguments.batch, arguments.steps)[:2]
            assert (np.asarray(tokens) >= 0).all()
        return slots, time.perf_counter() - began

    taken = []
    for _ in range(4):  # of which the first one compiles
        lengths, left = jnp.full_like(slots.left, arguments.prompt), jnp.full_like(slots.left, arguments.new)
        slots = dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, lengths=lengths), left=left)
        slots, seconds = run(slots)
        taken.append(seconds)
    made = arguments.batch * (arguments.new // arguments.steps) * arguments.steps
    return {"tok_s": round(made / min(taken[1:]), 1), "first_run_s": round(taken[0], 1)}


def filled_slots(engine: Engine, arguments: argparse.Namespace) -> Slots:
    """Slots whose cache holds random numbers in all its positions, made a layer at a time: of normal size once scaled."""
    if arguments.new % arguments.steps:
        raise SystemExit(f"--new {arguments.new} must be a multiple of --steps {arguments.steps} with --random-cache.")
    # not the engine's bucket, up to twice as large: what lies past a row's end is not read, and would have to be filled
    capacity = -(-(arguments.prompt + arguments.new) // SMALLEST) * SMALLEST
    slots = engine.empty_slots(arguments.batch, stops=1, capacity=capacity)
    positions = slots.cache.lengths
    shape = (arguments.batch, slots.cache.capacity, engine.config.num_kv_heads, engine.config.head_dim)

    @partial(jax.jit, donate_argnums=0)
    def fill(stack: KVStack, layer: jax.Array) -> KVStack:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), layer))
        k, v = (jax.random.normal(key, shape, engine.model_dtype) for key in keys)
        return append(stack, layer, k, v, positions)

    stack = slots.cache.stack
    for layer in range(engine.config.num_layers):
        stack = fill(stack, jnp.int32(layer))
    logits = jax.random.normal(jax.random.key(1), slots.logits.shape, slots.logits.dtype)
    return dataclasses.replace(slots, cache=KVCache(stack, positions), logits=logits)


def read_bytes(model: Llama, engine: Engine, arguments: argparse.Namespace) -> float:
    """What a device must read at the middle of the text: all weights but the embedding's, and keys and values."""
    config = model.config
    weights = tree_bytes(nnx.state(model.layers)) + tree_bytes(model.head_weight())
    positions = arguments.prompt + arguments.new / 2
    vector = config.head_dim * engine.stored.itemsize + (4 if engine.stored.itemsize == 1 else 0)  # with its scale
    rows = arguments.batch / engine.layout.row_shares
    cache = rows * positions * 2 * config.num_layers * config.num_kv_heads * vector
    return (weights + cache) / arguments.mesh.get("tensor", 1)


if __name__ == "__main__":
    main()
