"""What the backward pass keeps of each decoder layer: its choice by name, or by the memory there is."""

import os

import jax

from fastjax.errors import UserError
from fastjax.models.decoder import Runs
from fastjax.train.memory import StepMemory

CHOICES = ("auto", "none", "full", "offload")
# what scripts for HF and Unsloth say
ALIASES: dict[str | bool, str] = {True: "full", False: "none", "unsloth": "auto"}
SHARE = 0.88  # of what weights and states leave of the device: activations are one block, and what is free need not be
FEWEST_WHOLE = (
    8  # layers whole are an eighth of all, or none: fewer save a few hundredths of the time for all the memory
)
PINNED = 64 * 2**30  # host memory that XLA pins at most; it does so in powers of two


def choose_runs(gradient_checkpointing: str | bool, memory: StepMemory, limit: int | None, host: int) -> Runs:
    """The policies of the layers (decoder.py says what each keeps); "auto" keeps as many layers whole as fit `limit`.

    `limit` is the device's memory in bytes, None no limit; `host` that of the host for what is offloaded from the device.
    """
    choice = ALIASES.get(gradient_checkpointing, str(gradient_checkpointing))
    if choice == "auto":
        runs = fitting_runs(memory, limit, host)
        if runs is None:
            raise UserError(misfit(memory, limit or 0, host))
        return runs
    if choice == "none":
        return (("none", memory.layers),)
    if choice == "full":
        return (("full", memory.layers),)
    if choice == "offload":
        return offloading_runs(memory, memory.layers, host)
    raise UserError(f"gradient_checkpointing={gradient_checkpointing!r} is unknown; use one of {', '.join(CHOICES)}.")


def fitting_runs(memory: StepMemory, limit: int | None, host: int) -> Runs | None:
    """The fastest policies that fit: as many layers whole as can be beside offloaded ones.

    Offloaded layers come first: the backward pass reaches them last, when what the others kept is gone. None if even with
    every layer offloaded the step does not fit.
    """
    layers = memory.layers
    for whole in (*range(layers, -(-layers // FEWEST_WHOLE) - 1, -1), 0):
        runs = without_empty((*offloading_runs(memory, layers - whole, host), ("none", whole)))
        if fits(memory, runs, limit):
            return runs
    return None


def fits(memory: StepMemory, runs: Runs, limit: int | None) -> bool:
    return limit is None or memory.activations(runs) <= SHARE * (limit - memory.static)


def offloading_runs(memory: StepMemory, layers: int, host: int) -> Runs:
    """So many layers in the host's memory: with q, k and v if half of what may be pinned takes them, else without. Those
    for which there is no room keep their input on the device; so do a few if half then does for the others.
    """
    half = min(host, PINNED // 2 - PINNED // 128)
    if layers * memory.host["offload"] <= half:
        return without_empty((("offload", layers),))
    at_half, at_most = (min(layers, room // memory.host["offload_o"]) for room in (half, host))
    count = at_half if 10 * at_half >= 9 * layers else at_most
    return without_empty((("offload_o", count), ("full", layers - count)))


def without_empty(runs: Runs) -> Runs:
    return tuple((policy, count) for policy, count in runs if count)


def misfit(memory: StepMemory, limit: int, host: int) -> str:
    """One sentence: what is needed at least, what there is, and the three changes that help most."""
    least = memory.peak(offloading_runs(memory, memory.layers, host))
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


def host_memory() -> int:
    """Bytes of host memory for what each local device offloads: of what XLA may pin, and half of what there is."""
    there_is = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(PINNED - PINNED // 16, there_is // 2) // jax.local_device_count()
