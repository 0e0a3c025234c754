"""What the backward pass keeps of each decoder layer: its choice by name, or by the memory there is."""

import jax

from fastjax.errors import UserError
from fastjax.models.llama import Llama, Recompute

CHOICES = ("auto", "none", "full")


def choose_recompute(gradient_checkpointing: str | bool, model: Llama, tokens: int) -> Recompute:
    """ "none" keeps all that backward needs, "full" only each layer's input, "auto" the first where it fits.

    `tokens` are those of one micro-batch on one device.
    """
    # True and "unsloth" are what scripts for HF and Unsloth say
    aliases: dict[str | bool, str] = {True: "full", False: "none", "unsloth": "auto"}
    choice = aliases.get(gradient_checkpointing, str(gradient_checkpointing))
    if choice == "auto":
        free = free_device_memory()
        return "none" if free is None or kept_bytes(model, tokens) <= 0.8 * free else "full"
    if choice == "none" or choice == "full":
        return choice
    raise UserError(f"gradient_checkpointing={gradient_checkpointing!r} is unknown; use one of {', '.join(CHOICES)}.")


def free_device_memory() -> int | None:
    """Bytes still free on the fullest local device; None where the device does not say (the CPU)."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return min(free, default=None)


def kept_bytes(model: Llama, tokens: int) -> int:
    """An estimate of what "none" keeps: per token and layer 6 rows of hidden, q, k, v, the attended, 5 of the MLP."""
    config = model.config
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    per_token = 6 * config.hidden_size + heads + 5 * config.intermediate_size
    return config.num_layers * tokens * per_token * model.dtype.itemsize
