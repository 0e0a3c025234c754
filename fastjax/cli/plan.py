"""`fastjax plan CONFIG.yaml [key=value ...]`: the memory a run will need, before anything is loaded or compiled."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastjax.api import checked_dtype, find_model
from fastjax.cli.config import RunConfig, load_run_config
from fastjax.errors import UserError
from fastjax.lora import LoraConfig, add_lora
from fastjax.models import Llama, LlamaConfig, init_weights, param_specs
from fastjax.models.decoder import Runs
from fastjax.parallel.compressed import bits_of, owed_shapes
from fastjax.parallel.mesh import TOKEN_AXES, planned_mesh
from fastjax.parallel.sequence import part_length
from fastjax.train.memory import StepMemory, step_memory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from fastjax.train.recompute import choose_runs, fits, fitting_runs, gib, misfit, named_runs
from fastjax.train.room import Room, planned_room
from fastjax.train.step import trained_parameters
from fastjax.train.tensor_parallel import check_tensor_size
from fastjax.weights.adapter import read_adapter_config
from fastjax.weights.checkpoint import read_config
from fastjax.weights.placement import make_target
from pallas_kernels import quantize_nf4

EXAMPLE = "example: fastjax plan configs/llama3.1-8b-qlora.yaml --memory 24"
LONGEST = 1 << 22  # tokens; no search goes past it
SHORT = 256  # tokens; nor below
MOST_SPLITS = 6  # a search for devices to split a model over doubles them so often


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan", help="what memory a run will need, before it runs", epilog=EXAMPLE)
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file `fastjax train` takes")
    command.add_argument("overrides", nargs="*", default=(), metavar="key=value", help="as for `fastjax train`")
    command.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="that a run may use of each device to plan for, of which JAX gives it 0.75 unless XLA_PYTHON_CLIENT_MEM_FRACTION"
        " says otherwise; default: of this one's",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    config = load_run_config(options.config, options.overrides)
    room = planned_room(math.prod(config.mesh.values()))
    if options.memory is not None:
        if options.memory <= 0:
            raise UserError(f"--memory {options.memory:g} must be GiB of a device, such as 80.")
        room = room._replace(device=int(options.memory * 2**30))
    print("\n".join(report(config, room)))


def check_fit(config: RunConfig, room: Room) -> None:
    """Refuses a run that cannot fit before anything is loaded. Rows that are not packed may turn out short: then what
    takes no rows to know is checked.
    """
    if room.device is None:
        return
    length = max_length(config) if config.train.packing else SHORT
    train = config.train.gradient_checkpointing
    choice = (config.lora or {}).get("use_gradient_checkpointing", "auto") if train == "auto" else train
    choose_runs(choice, memory_of(config)(config.train.per_device_train_batch_size, length), *room)


def max_length(config: RunConfig) -> int:
    return config.train.max_length or config.train.max_seq_length or config.model.get("max_seq_length", 2048)


def memory_of(config: RunConfig) -> Callable[[int, int], StepMemory]:
    """(rows a device, their length) -> what a step takes."""
    model = abstract_model(config)
    params = trained_parameters(model)
    opt_state = jax.eval_shape(make_optimizer(config.train.optim, learning_rate=1e-4).init, params)
    devices = math.prod(config.mesh.get(axis, 1) for axis in TOKEN_AXES)
    bits = bits_of(config.train.gradient_reduction, devices)
    if bits:  # a part of the state, as the optimizer's is
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        opt_state = (opt_state, owed_shapes(size, devices))
    accumulate = config.train.gradient_accumulation_steps > 1
    layout = MeshLayout.planned(model, config.mesh, in_codes=bits is not None) if config.mesh else None

    def memory_at(rows: int, length: int) -> StepMemory:
        context = config.mesh.get("context", 1)
        tokens = rows * (part_length(length, context) if context > 1 else length)
        return step_memory(model, opt_state, tokens, row=length, accumulate=accumulate, layout=layout)

    return memory_at


def abstract_model(config: RunConfig) -> Llama:
    """The model a run would load, of shapes and dtypes alone."""
    directory, base, _ = find_model(config.model["model_name"])
    llama = LlamaConfig.from_hf(read_config(base))
    packed, full = config.model.get("load_in_4bit", True), config.model.get("full_finetuning", False)
    dtype = checked_dtype(config.model.get("dtype", "bfloat16"), load_in_4bit=packed, full_finetuning=full)
    check_tensor_size(llama, config.mesh.get("tensor", 1), packed=packed)
    for spec in param_specs(llama).values():  # each must split evenly, as when it is loaded
        make_target(spec, quantize=packed and spec.quantize, dtype=dtype, mesh=planned_mesh(config.mesh))

    def build() -> Llama:
        weights: dict[str, Any] = init_weights(llama, jax.random.key(0), jnp.float32 if full else dtype)
        for name, spec in param_specs(llama).items():
            if packed and spec.quantize:
                one = quantize_nf4(weights[name][0])
                weights[name] = jax.tree.map(lambda leaf: jnp.stack([leaf] * llama.num_layers), one)
        model = Llama(llama, weights, dtype=dtype, trainable=full)
        if directory != base:
            add_lora(model, read_adapter_config(directory)[0])
        if config.lora is not None:
            lora = {key: value for key, value in config.lora.items() if key != "use_gradient_checkpointing"}
            add_lora(model, LoraConfig.create(**lora))
        return model

    return nnx.eval_shape(build)


def report(config: RunConfig, room: Room) -> list[str]:
    memory_at, rows, length = memory_of(config), config.train.per_device_train_batch_size, max_length(config)
    memory, (limit, host) = memory_at(rows, length), room
    lines = [f"{config.model['model_name']}, {rows} x {length} tokens{_share(config)} a device, GiB"]
    lines += [f"  {name:<28}{gib(size):>8}" for name, size in _parts(memory)]
    lines.append(f"  {'device':<28}{'unknown' if limit is None else gib(limit):>8}")
    lines.append(f"{'gradient_checkpointing':<30}{'activations':>12}{'peak':>8}{'':4}{'longest context, 1 row'}")
    for policy in ("none", "full", "offload"):
        runs = named_runs(policy, memory, host)
        longest = "" if limit is None else f"{longest_context(memory_at, policy, room):,}"
        lines.append(
            _row(policy, memory, runs, f"{longest:<16}", [] if fits(memory, runs, limit) else ["does not fit"])
        )
    runs = fitting_runs(memory, limit, host)
    if runs is None:
        return [*lines, misfit(memory, limit or 0, host), *what_would_fit(config, memory_at, room)]
    return [*lines, _row("auto", memory, runs, "", [f"{count} layers {policy}" for policy, count in runs])]


def what_would_fit(config: RunConfig, memory_at: Callable[[int, int], StepMemory], room: Room) -> list[str]:
    """A line with the change of each kind that is least, of those that are enough by themselves."""
    rows, length, fsdp = config.train.per_device_train_batch_size, max_length(config), config.mesh.get("fsdp", 1)
    found = []
    if (fewer := _most(lambda n: fitting_runs(memory_at(n, length), *room) is not None, rows - 1)) > 0:
        found.append(f"per_device_train_batch_size={fewer}")
    if (shorter := longest_context(memory_at, "auto", room, rows)) > 0:
        found.append(f"max_length={shorter}")
    for size in (fsdp * 2**power for power in range(1, 1 + MOST_SPLITS)):
        with contextlib.suppress(UserError):  # of a size that does not divide
            memory = memory_of(dataclasses.replace(config, mesh=config.mesh | {"fsdp": size}))(rows, length)
            if fitting_runs(memory, *room) is not None:
                found.append(f"mesh.fsdp={size}")
                break
    return [f"each of these would fit by itself: {', '.join(found)}"] if found else []


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


def longest_context(memory_at: Callable[[int, int], StepMemory], policy: str, room: Room, rows: int = 1) -> int:
    """Tokens of the longest rows, in multiples of SHORT, whose step fits; 0 if none does."""

    def fitting(length: int) -> bool:
        memory = memory_at(rows, length * SHORT)
        if policy == "auto":
            return fitting_runs(memory, *room) is not None
        return fits(memory, named_runs(policy, memory, room.host), room.device)

    return SHORT * _most(fitting, LONGEST // SHORT)


def _most(fitting: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, as all smaller ones do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle - 1)
    return low
