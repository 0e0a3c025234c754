"""Several adapters on one base, each row of a batch with its own.

The adapters' LoRA factors lie side by side as those of one LoRA, each with as many columns: z = x A then has a block of
numbers for each adapter, and a row keeps those of its own, the others being zero. So a batch is one product with the base
and one with all factors, whatever its rows ask for; a row without an adapter keeps none.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastjax.errors import UserError
from fastjax.lora import PROJECTIONS, LoRA, find_linear, lora_modules
from fastjax.models.llama import Llama
from fastjax.weights.adapter import is_adapter, load_adapter
from pallas_kernels.nf4 import padded_rank


def with_adapters(model: Llama, directories: Sequence[str | Path]) -> tuple[Llama, int]:
    """A model over the same base weights that carries all adapters, and how many columns each of them has."""
    if lora_modules(model):
        raise UserError(
            "the model carries an adapter already: load its base by itself, and name the adapter's directory in adapters=."
        )
    loaded = [_loaded(model, Path(directory)) for directory in directories]
    columns = max(padded_rank(lora.a.shape[-1]) for modules in loaded for lora in modules.values())
    combined = _copy(model)
    for projection in PROJECTIONS:
        if any(projection in modules for modules in loaded):
            linear = find_linear(combined, projection)
            linear.lora = _side_by_side(
                [modules.get(projection) for modules in loaded], columns, linear.weight.get_value()
            )
    return combined, columns


def _copy(model: Llama) -> Llama:
    """Another module of the same arrays."""
    return nnx.merge(*nnx.split(model))


def _loaded(model: Llama, directory: Path) -> dict[str, LoRA]:
    if not is_adapter(directory):
        raise UserError(f"adapters: {directory} holds no adapter; name a directory with an adapter_config.json.")
    copy = _copy(model)
    if load_adapter(directory, copy).modules_to_save:
        raise UserError(
            f"adapters: {directory} brings a head or an embedding of its own (modules_to_save), which cannot be chosen per "
            "prompt; load it as the model's only adapter."
        )
    return lora_modules(copy)


def _side_by_side(loras: Sequence[LoRA | None], columns: int, weight: object) -> LoRA:
    """Each in `columns` columns of its own; of one that is not there they are zero."""
    layers, out, into = weight.shape  # pyright: ignore[reportAttributeAccessIssue]
    count = columns * len(loras)
    a, b, scale = (
        np.zeros(shape, np.float32) for shape in ((layers, into, count), (layers, count, out), (layers, count))
    )
    for number, lora in enumerate(loras):
        if lora is not None:
            own = slice(number * columns, number * columns + lora.a.shape[-1])
            a[:, :, own], b[:, own], scale[:, own] = lora.a[...], lora.b[...], np.asarray(lora.scale[...])[:, None]
    return LoRA(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale), 0.0)


def row_columns(adapters: Sequence[int | None], count: int, columns: int) -> np.ndarray:
    """1 in the columns of each row's adapter, of `count`, and 0 in the others: [rows, count * columns]."""
    numbers = np.array([-1 if adapter is None else adapter for adapter in adapters])
    return (np.arange(count * columns)[None] // columns == numbers[:, None]).astype(np.float32)
