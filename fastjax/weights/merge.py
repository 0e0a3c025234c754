"""Whole models out: every weight dequantised, LoRA added into it, written as a HF checkpoint layer by layer."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastjax.distributed.roles import is_writer
from fastjax.lora import PROJECTIONS, LoRA, find_linear, merged_weight
from fastjax.models import Llama, param_specs
from fastjax.parallel.hosts import to_host
from fastjax.weights.save import WEIGHT_FILES, ExportTensor, export_tensors, read_along, write_weights
from fastjax.weights.staging import staged_directory


def model_weights(model: Llama) -> dict[str, Any]:
    """The model's weights without LoRA, by the names of `param_specs`."""
    weights = {}
    for name in param_specs(model.config):
        variable: Any = model
        for part in name.split("."):
            variable = getattr(variable, part)
        weights[name] = variable.get_value()
    return weights


def merged_tensors(model: Llama, dtype: Any) -> Iterator[ExportTensor]:
    """All tensors of the model under their HF names, in `dtype`, with LoRA added in float32 before rounding."""
    specs = param_specs(model.config)
    loras = {}
    for projection in PROJECTIONS:
        names = specs[f"layers.{projection}.weight"].hf_names()
        lora = find_linear(model, projection).lora
        if lora is not None:
            loras |= {name: (lora, layer) for layer, name in enumerate(names)}
    exact = {tensor.name: tensor for tensor in export_tensors(model_weights(model), specs, dtype=jnp.float32)}
    for tensor in export_tensors(model_weights(model), specs, dtype=dtype):
        if tensor.name in loras:
            read = partial(_merge, exact[tensor.name], *loras[tensor.name], tensor.dtype)
            tensor = ExportTensor(tensor.name, tensor.shape, tensor.dtype, read)
        yield tensor
    if model.config.tie_word_embeddings and model.lm_head is not None:
        head = model.lm_head.weight[...]
        yield ExportTensor("lm_head.weight", head.shape, np.dtype(dtype), lambda: to_host(head.astype(dtype)))


def _merge(weight: ExportTensor, lora: LoRA, layer: int, dtype: np.dtype) -> np.ndarray:
    factors = (jnp.asarray(to_host(factor[...][layer])) for factor in (lora.a, lora.b, lora.scale))
    merged = merged_weight(jnp.asarray(weight.read()), *factors)
    return np.asarray(merged.astype(dtype))


def save_model(directory: Path, model: Llama, *, hf_config: Mapping[str, Any], dtype: Any = None) -> None:
    """Write weights and config.json, in `dtype` or else the one the model computes in.

    `hf_config` are further entries for config.json, such as the token ids of the checkpoint the model came from.
    """
    dtype = jnp.dtype(model.dtype if dtype is None else dtype)
    tied = model.config.tie_word_embeddings and model.lm_head is None
    config = {**hf_config, **model.config.to_hf(), "tie_word_embeddings": tied, "dtype": dtype.name}
    # what described the source's weights does not describe these
    for key in ("quantization_config", "torch_dtype", "rope_scaling"):
        config.pop(key, None)
    if not is_writer():
        read_along(merged_tensors(model, dtype))
        return
    with staged_directory(directory, replaces=WEIGHT_FILES) as staging:
        write_weights(staging, merged_tensors(model, dtype))
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
