"""What the backward pass keeps of each decoder layer: its choice by name, or by the memory there is."""

import jax

from fastjax.errors import UserError
from fastjax.models.decoder import POLICIES, Runs
from fastjax.train.memory import StepMemory

CHOICES = ("auto", *POLICIES)
# what scripts for HF and Unsloth say
ALIASES: dict[str | bool, str] = {True: "full", False: "none", "unsloth": "auto"}
SHARE = 0.95  # of the device's memory that a step may count on; the rest is lost between buffers


def choose_runs(gradient_checkpointing: str | bool, memory: StepMemory, limit: int | None) -> Runs:
    """The policies of the layers (decoder.py says what each keeps); "auto" keeps as many layers whole as fit `limit`.

    `limit` is the device's memory in bytes; None is no limit.
    """
    choice = ALIASES.get(gradient_checkpointing, str(gradient_checkpointing))
    if choice == "auto":
        runs = fitting_runs(memory, limit)
        if runs is None:
            raise UserError(misfit(memory, limit or 0))
        return runs
    for policy in POLICIES:
        if choice == policy:
            return ((policy, memory.layers),)
    raise UserError(f"gradient_checkpointing={gradient_checkpointing!r} is unknown; use one of {', '.join(CHOICES)}.")


def fitting_runs(memory: StepMemory, limit: int | None) -> Runs | None:
    """The fastest policies that fit: as many layers whole as can be beside recomputed ones, else beside offloaded ones.

    Layers that are run again come first: the backward pass reaches them last, when what the others kept is gone. None
    if even with every layer offloaded the step does not fit.
    """
    for rest in ("full", "offload"):
        for whole in range(memory.layers, -1, -1):
            runs = _without_empty(((rest, memory.layers - whole), ("none", whole)))
            if limit is None or memory.peak(runs) <= SHARE * limit:
                return runs
    return None


def _without_empty(runs: Runs) -> Runs:
    return tuple((policy, count) for policy, count in runs if count)


def misfit(memory: StepMemory, limit: int) -> str:
    """One sentence: what is needed at least, what there is, and the three changes that help most."""
    least = memory.peak((("offload", memory.layers),))
    return (
        f"a step needs at least {gib(least)} GiB on each device even with every layer offloaded, and it has "
        f"{gib(limit)}: halve per_device_train_batch_size (and double gradient_accumulation_steps), shorten max_length, "
        "or split the model over more devices with mesh.fsdp, its rows with mesh.context."
    )


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def device_memory() -> int | None:
    """Bytes that the smallest local device lets this process use; None where it does not say (the CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return min((stat["bytes_limit"] for stat in stats if stat and "bytes_limit" in stat), default=None)
