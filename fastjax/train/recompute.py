"""What the backward pass keeps of each decoder layer: its choice by name, or by the memory there is."""

import jax

from fastjax.errors import UserError
from fastjax.models.decoder import POLICIES, Policy, Runs
from fastjax.models.llama import Llama

CHOICES = ("auto", *POLICIES)
# what scripts for HF and Unsloth say
ALIASES: dict[str | bool, str] = {True: "full", False: "none", "unsloth": "auto"}
SHARE = 0.8  # of the free memory that kept activations may fill; the rest is for what one layer computes with


def choose_runs(gradient_checkpointing: str | bool, model: Llama, tokens: int) -> Runs:
    """The policies of the layers (decoder.py says what each keeps); "auto" keeps as many layers whole as fit.

    `tokens` are those of one micro-batch on one device.
    """
    choice = ALIASES.get(gradient_checkpointing, str(gradient_checkpointing))
    layers = model.config.num_layers
    if choice == "auto":
        return fitting_runs(model, tokens, free_device_memory())
    for policy in POLICIES:
        if choice == policy:
            return ((policy, layers),)
    raise UserError(f"gradient_checkpointing={gradient_checkpointing!r} is unknown; use one of {', '.join(CHOICES)}.")


def fitting_runs(model: Llama, tokens: int, free: int | None) -> Runs:
    """As many layers kept whole as fit into `free` bytes (None: no limit), the others recomputed.

    The recomputed ones come first: the backward pass reaches them last, when what the others kept is gone.
    """
    layers = model.config.num_layers
    inputs, whole = kept_bytes(model, tokens, "full"), kept_bytes(model, tokens, "none")
    room = whole * layers if free is None else SHARE * free
    kept = min(layers, max(0, int((room - inputs * layers) // (whole - inputs))))
    runs: list[tuple[Policy, int]] = [("full", layers - kept), ("none", kept)]
    return tuple((policy, count) for policy, count in runs if count)


def free_device_memory() -> int | None:
    """Bytes still free on the fullest local device; None where the device does not say (the CPU)."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return min(free, default=None)


def kept_bytes(model: Llama, tokens: int, policy: Policy) -> int:
    """On the device, of one layer: what decoder_layer.Saved holds, LoRA's low-rank products left out."""
    config, size = model.config, model.dtype.itemsize
    if policy == "offload":
        return 0
    if policy == "full":
        return tokens * config.hidden_size * size
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    row = 2 * config.hidden_size + heads + 2 * config.intermediate_size
    return tokens * (row * size + 4 * config.num_heads)
