"""`fastjax plan CONFIG.yaml [key=value ...]`: the memory a run will need, before anything is loaded or compiled."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastjax.cli.config import RunConfig, load_run_config
from fastjax.lora import LoraConfig, add_lora
from fastjax.models import Llama, LlamaConfig, init_weights, param_specs
from fastjax.models.decoder import Runs
from fastjax.parallel.compressed import bits_of, owed_shapes
from fastjax.parallel.mesh import TOKEN_AXES
from fastjax.parallel.sequence import part_length
from fastjax.train.memory import StepMemory, step_memory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from fastjax.train.recompute import choose_runs, device_memory, fits, fitting_runs, gib, host_memory, misfit
from fastjax.train.tensor_parallel import check_tensor_size
from fastjax.weights.checkpoint import read_config, resolve_checkpoint
from pallas_kernels import quantize_nf4

EXAMPLE = "example: fastjax plan configs/llama3.1-8b-qlora.yaml --memory 24"
LONGEST = 1 << 22  # tokens; no search goes past it


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan", help="what memory a run will need, before it runs", epilog=EXAMPLE)
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file `fastjax train` takes")
    command.add_argument("overrides", nargs="*", default=(), metavar="key=value", help="as for `fastjax train`")
    command.add_argument("--memory", type=float, metavar="GIB", help="of the device to plan for; default: this one's")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    config = load_run_config(options.config, options.overrides)
    limit = device_memory() if options.memory is None else int(options.memory * 2**30)
    model = abstract_model(config)
    length = config.train.max_length or config.train.max_seq_length or config.model.get("max_seq_length", 2048)

    params = nnx.state(model, nnx.Param)
    opt_state = jax.eval_shape(make_optimizer(config.train.optim, learning_rate=1e-4).init, params)
    devices = math.prod(config.mesh.get(axis, 1) for axis in TOKEN_AXES)
    bits = bits_of(config.train.gradient_reduction, devices)
    if bits:  # a part of the state, as the optimizer's is
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        opt_state = (opt_state, owed_shapes(size, devices))
    accumulate = config.train.gradient_accumulation_steps > 1
    check_tensor_size(model.config, config.mesh.get("tensor", 1), packed=model_is_packed(config))
    layout = MeshLayout.planned(model, config.mesh, in_codes=bits is not None) if config.mesh else None

    def memory_at(rows: int, length: int) -> StepMemory:
        context = config.mesh.get("context", 1)
        tokens = rows * (part_length(length, context) if context > 1 else length)
        return step_memory(model, opt_state, tokens, row=length, accumulate=accumulate, layout=layout)

    print("\n".join(report(config, memory_at, config.train.per_device_train_batch_size, length, limit)))


def abstract_model(config: RunConfig) -> Llama:
    """The model a run would load, of shapes and dtypes alone."""
    hf_config = read_config(resolve_checkpoint(config.model["model_name"]))
    llama = LlamaConfig.from_hf(hf_config)
    full, packed = bool(config.model.get("full_finetuning")), model_is_packed(config)
    dtype = jnp.dtype(config.model.get("dtype", "bfloat16"))

    def build() -> Llama:
        weights: dict[str, Any] = init_weights(llama, jax.random.key(0), jnp.float32 if full else dtype)
        for name, spec in param_specs(llama).items():
            if packed and spec.quantize:
                one = quantize_nf4(weights[name][0])
                weights[name] = jax.tree.map(lambda leaf: jnp.stack([leaf] * llama.num_layers), one)
        model = Llama(llama, weights, dtype=dtype, trainable=full)
        if config.lora is not None:
            lora = {key: value for key, value in config.lora.items() if key != "use_gradient_checkpointing"}
            add_lora(model, LoraConfig.create(**lora))
        return model

    return nnx.eval_shape(build)


def model_is_packed(config: RunConfig) -> bool:
    return bool(config.model.get("load_in_4bit", True)) and not config.model.get("full_finetuning")


def report(
    config: RunConfig, memory_at: Callable[[int, int], StepMemory], rows: int, length: int, limit: int | None
) -> list[str]:
    memory, host = memory_at(rows, length), host_memory()
    lines = [f"{config.model['model_name']}, {rows} x {length} tokens{_share(config)} a device, GiB"]
    lines += [f"  {name:<28}{gib(size):>8}" for name, size in _parts(memory)]
    lines.append(f"  {'device':<28}{'unknown' if limit is None else gib(limit):>8}")
    lines.append(f"{'gradient_checkpointing':<30}{'activations':>12}{'peak':>8}{'':4}{'longest context, 1 row'}")
    for policy in ("none", "full", "offload"):
        runs = choose_runs(policy, memory, limit, host)
        longest = "" if limit is None else f"{longest_context(memory_at, policy, limit):,}"
        lines.append(
            _row(policy, memory, runs, f"{longest:<16}", [] if fits(memory, runs, limit) else ["does not fit"])
        )
    runs = fitting_runs(memory, limit, host)
    if runs is None:
        return [*lines, misfit(memory, limit or 0, host)]
    return [*lines, _row("auto", memory, runs, "", [f"{count} layers {policy}" for policy, count in runs])]


def _row(policy: str, memory: StepMemory, runs: Runs, longest: str, remarks: list[str]) -> str:
    if host := memory.on_host(runs):
        remarks = [*remarks, f"{gib(host)} in host memory"]
    sizes = f"{gib(memory.activations(runs)):>12}{gib(memory.peak(runs)):>8}"
    return f"  {policy:<28}{sizes}{'':4}{longest}{', '.join(remarks)}".rstrip()


def _share(config: RunConfig) -> str:
    context = config.mesh.get("context", 1)
    return f" / {context}" if context > 1 else ""


def _parts(memory: StepMemory) -> list[tuple[str, int]]:
    return [
        ("weights", memory.weights),
        ("trained parameters, twice", 2 * memory.trained),
        ("their gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("at work in the loss", memory.loss_work),
        ("at work in a layer", memory.layer_work),
        ("in a layer run again", memory.again_work),
    ]


def longest_context(memory_at: Callable[[int, int], StepMemory], policy: str, limit: int, step: int = 256) -> int:
    """Tokens of the longest single row, in multiples of `step`, whose step fits; 0 if none does."""
    low, high = 0, LONGEST // step
    while low < high:
        middle = (low + high + 1) // 2
        memory = memory_at(1, middle * step)
        if fits(memory, choose_runs(policy, memory, limit, host_memory()), limit):
            low = middle
        else:
            high = middle - 1
    return low * step
