"""The training step alone: tokens per second, peak memory, compile time, and the fraction of the card's own limit.

    python -m bench.step --shape llama3.1-8b --batch 8 --seq 2048 --policy none [--trace] [--out step.json]

One JSON line; with --trace, first a table of where the time goes. Weights are random, packed on the device. The limit
counts only the matrix products of frozen weights and attention's, at the rate a plain bf16 product reaches on the same card
in the same run: forward and backward, and what the policy of each layer has backward do again (`again_flops`). Rows recorded
before 2026-11-22 counted a whole second forward pass, the head's and the MLP's last products too, for `full` and `offload`,
and nothing for `auto`.

`first_step_s` is the first step as a user waits for it, and `first_step_parts` says what of it went into tracing, lowering
(which compiles Triton's kernels), XLA's compiler or its cache; the rest is loading kernels and the step itself. With --steps 0,
for steps that take minutes, the rest of the first step is the step's time. Cold is without --cache; warm is the second of two
runs with it, each a process of its own:

    for i in 1 2; do XDG_CACHE_HOME=/tmp/cache python -m bench.step --steps 0 --cache; done
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.record import print_row
from bench.trace import busy_fraction, by_kind, by_name, traced_kernels
from bench.workloads import SHAPES, random_packed_model
from fastjax import FastLanguageModel, TrainState, init_train_state, make_mesh, make_train_step
from fastjax.compile_cache import enable_compile_cache
from fastjax.models import LlamaConfig, param_specs
from fastjax.models.decoder import Policy, Runs
from fastjax.parallel.hosts import place_batch
from fastjax.train.memory import StepMemory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from fastjax.train.recompute import choose_runs
from fastjax.train.room import find_room
from fastjax.train.step import memory_of_step
from pallas_kernels.workloads import packed_lengths

PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile or read",
    "/jax/compilation_cache/cache_retrieval_time_sec": "of which reading",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument(
        "--packed", action="store_true", help="rows are documents of lognormal lengths, mean 600, end to end"
    )
    parser.add_argument("--policy", default="auto")
    parser.add_argument(
        "--steps", type=int, default=6, help="after the first two; 0: the first alone, once it is compiled"
    )
    parser.add_argument("--mesh", type=mesh_sizes, default={}, help="such as data=2,fsdp=2; the batch is that of all")
    parser.add_argument("--loop", action="store_true", help="compile one layer and loop over it")
    parser.add_argument(
        "--cache", action="store_true", help="take compiled programs from the user's cache, and keep them"
    )
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.cache:
        enable_compile_cache()
    print_row(measure(arguments), arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    mesh = make_mesh(**arguments.mesh) if arguments.mesh else None
    began = time.perf_counter()
    module = random_packed_model(SHAPES[arguments.shape], mesh=mesh, scan_layers=arguments.loop)
    model = FastLanguageModel.get_peft_model(FastLanguageModel(module, mesh=mesh), r=16, lora_alpha=16)
    optimizer = make_optimizer("adamw_8bit", learning_rate=2e-4)
    state = init_train_state(model, optimizer)
    jax.block_until_ready((nnx.state(module), state))
    made, held = time.perf_counter() - began, held_gib()
    step = make_train_step(model, optimizer, mesh, gradient_checkpointing=arguments.policy)
    before = peak_gib()  # making random weights must not be what a step is measured by
    rows, context = random_rows(arguments, model.config.vocab_size)
    batch = jax.device_put(place_batch(rows, mesh, arguments.batch))
    began = time.perf_counter()
    with compile_parts() as parts:
        compile_step(step, state, batch)
        compiled = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
    first, seconds = time.perf_counter() - began, time.perf_counter() - compiled
    if arguments.steps:
        state, metrics = jax.block_until_ready(step(state, batch))
        began = time.perf_counter()
        for _ in range(arguments.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - began) / arguments.steps
    devices = mesh.size if mesh else 1
    peak, count = peak_gib(), arguments.batch * arguments.seq
    traced: dict[str, Any] = trace(step, state, batch, devices) if arguments.trace else {}
    rate = matmul_rate()
    layout = None if mesh is None else MeshLayout.of(module, mesh)
    memory = memory_of_step(module, state, batch, layout)
    runs = choose_runs(arguments.policy, memory, *find_room(mesh))
    return {
        "peer": "fastjax",
        "shape": arguments.shape,
        "bs": arguments.batch,
        "seq": arguments.seq,
        "packed": arguments.packed,
        "policy": arguments.policy,
        "mesh": arguments.mesh,
        "devices": devices,
        "held_GiB": held,
        "planned_held_GiB": gib(memory.static - memory.gradients),
        "made_s": round(made, 1),
        "tok_s": round(count / seconds),
        "step_s": round(seconds, 4),
        "peak_GiB": peak,
        "peak_before_GiB": before,
        **planned_peak(memory, runs),
        "first_step_s": round(first, 2),
        "first_step_parts": parts,
        "cached": arguments.cache,
        "loss": round(float(metrics["loss"]), 3),
        "matmul_tflops": round(rate / 1e12),
        "fraction_of_limit": round(count * flops_per_token(model.config, context, runs) / rate / seconds / devices, 3),
        **traced,
    }


def compile_step(step: Any, state: TrainState, batch: dict[str, jax.Array]) -> None:
    """All that comes before the step runs for the first time; JAX keeps what is compiled, and the call finds it."""
    step.lower(state, batch).compile()


@contextlib.contextmanager
def compile_parts() -> Iterator[dict[str, float]]:
    """Seconds by part of what is compiled meanwhile: of each part the longest, which holds those of functions within."""
    parts: dict[str, float] = {}

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        if (name := PARTS.get(event)) is not None:
            parts[name] = round(max(parts.get(name, 0.0), duration_secs), 2)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield parts
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def peak_gib() -> float:
    """Of all that this process has held at once so far, on the device that held most."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return gib(max(peaks))


def random_rows(arguments: argparse.Namespace, vocabulary: int) -> tuple[dict[str, np.ndarray], float]:
    """A batch, and the length of the document that a token lies in, on average."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocabulary, (arguments.batch, arguments.seq)).astype(np.int32)
    rows = {"input_ids": ids, "labels": ids}
    if not arguments.packed:
        return rows, arguments.seq
    lengths = [packed_lengths(generator, arguments.seq) for _ in range(arguments.batch)]
    rows["segment_ids"] = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(np.int32)
    rows["positions"] = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    return rows, float(sum((row**2).sum() for row in lengths) / ids.size)


def mesh_sizes(text: str) -> dict[str, int]:
    """ "data=2,fsdp=2" as sizes by axis."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


def trace(step: Any, state: Any, batch: Any, devices: int, steps: int = 2) -> dict[str, Any]:
    """Where the time goes, printed and returned; the mean over devices."""

    def run() -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        return metrics

    kernels = traced_kernels(run)
    kinds = by_kind(kernels, steps * devices)
    for title, table in (("by kernel", by_name(kernels, steps * devices)), ("by kind", kinds)):
        print(f"ms a step, {title}")
        print("\n".join(f"{milliseconds:10.3f}  {name}" for name, milliseconds in table.items()), flush=True)
    return {"busy": round(busy_fraction(kernels), 4), "ms_by_kind": kinds}


def flops_per_token(config: LlamaConfig, length: float, runs: Runs) -> float:
    """Forward and input-gradient products of the frozen weights, causal attention, and what is done again."""
    forward = layer_flops(config) + attention_flops(config, length)
    backward = layer_flops(config) + 2.5 * attention_flops(config, length)
    head = 2 * 2 * config.vocab_size * config.hidden_size
    again = sum(count * again_flops(config, length, policy) for policy, count in runs)
    return config.num_layers * (forward + backward) + head + again


def again_flops(config: LlamaConfig, length: float, policy: Policy) -> float:
    """What backward does again of a layer for one token: q/k/v, o, gate/up and attention, of which `offload_o` has the
    output; never the MLP's last product, whose result nothing in backward reads (decoder_layer.py)."""
    if policy == "none":
        return 0
    attention = 0 if policy == "offload_o" else attention_flops(config, length)
    return layer_flops(config) - 2 * config.intermediate_size * config.hidden_size + attention


def layer_flops(config: LlamaConfig) -> float:
    """Of one layer's products with frozen weights, forward."""
    specs = param_specs(config).values()
    return sum(2 * spec.shape[0] * spec.shape[1] for spec in specs if spec.quantize and spec.layers)


def attention_flops(config: LlamaConfig, length: float) -> float:
    """Of one layer, forward, the causal half of the square."""
    return 2 * config.num_heads * config.head_dim * length


def held_gib() -> float:
    """What this process holds now, on the device that holds most."""
    return gib(max((device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()))


def planned_peak(memory: StepMemory, runs: Runs) -> dict[str, Any]:
    """What `fastjax plan` would have said of the step, and what it keeps of how many layers."""
    return {"planned_GiB": gib(memory.peak(runs)), "planned_host_GiB": gib(memory.on_host(runs)), "layers": dict(runs)}


def gib(size: float) -> float:
    return round(size / 2**30, 2)


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
