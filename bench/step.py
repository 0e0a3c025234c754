"""The training step alone: tokens per second, peak memory, compile time, and the fraction of the card's own limit.

    python -m bench.step --shape llama3.1-8b --batch 8 --seq 2048 --policy none [--trace] [--out step.json]

One JSON line; with --trace, first a table of where the time goes. Weights are random, packed on the device. The limit
counts only the matrix products that must be done, at the rate a plain bf16 product reaches on the same card in the same
run.

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
from jax.sharding import Mesh

from bench.record import print_row
from bench.trace import busy_fraction, by_kind, by_name, traced_kernels
from bench.workloads import SHAPES, random_packed_model
from fastjax import FastLanguageModel, TrainState, init_train_state, make_mesh, make_train_step
from fastjax.compile_cache import enable_compile_cache
from fastjax.models import Llama, LlamaConfig, param_specs
from fastjax.parallel.hosts import place_batch
from fastjax.train.memory import step_memory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from fastjax.train.recompute import choose_runs, device_memory, host_memory
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
    recomputed = arguments.policy in ("full", "offload")
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
        "planned_held_GiB": planned_held_gib(module, state, mesh),
        "made_s": round(made, 1),
        "tok_s": round(count / seconds),
        "step_s": round(seconds, 4),
        "peak_GiB": peak,
        "peak_before_GiB": before,
        **planned_peak(module, state, mesh, arguments),
        "first_step_s": round(first, 2),
        "first_step_parts": parts,
        "cached": arguments.cache,
        "loss": round(float(metrics["loss"]), 3),
        "matmul_tflops": round(rate / 1e12),
        "fraction_of_limit": round(
            count * flops_per_token(model.config, context, recomputed) / rate / seconds / devices, 3
        ),
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
    return round(max(peaks) / 2**30, 2)


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


def flops_per_token(config: LlamaConfig, length: float, recomputed: bool) -> float:
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


def held_gib() -> float:
    """What this process holds now, on the device that holds most."""
    return round(max((device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()) / 2**30, 2)


def planned_held_gib(module: Llama, state: TrainState, mesh: Mesh | None) -> float:
    """What `fastjax plan` would have a device hold between steps."""
    layout = None if mesh is None else MeshLayout.of(module, mesh)
    memory = step_memory(module, state.opt_state, tokens=1, layout=layout)
    return round((memory.static - memory.gradients) / 2**30, 2)


def planned_peak(module: Llama, state: TrainState, mesh: Mesh | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `fastjax plan` would have said of the step on one device, and what it keeps of how many layers."""
    if mesh is not None:
        return {}
    memory = step_memory(module, state.opt_state, arguments.batch * arguments.seq, row=arguments.seq)
    runs = choose_runs(arguments.policy, memory, device_memory(), host_memory())
    sizes = {"planned_GiB": memory.peak(runs), "planned_host_GiB": memory.on_host(runs)}
    return {name: round(size / 2**30, 2) for name, size in sizes.items()} | {"layers": dict(runs)}


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
