"""LoRA adapters in Hugging Face PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`.

PEFT keeps A as [r, in] and B as [out, r], one pair per layer; ours are their transposes, stacked over the layers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastjax.distributed.roles import is_writer
from fastjax.errors import UserError
from fastjax.lora import LoRA, LoraConfig, add_lora, lora_modules
from fastjax.models.llama import Llama
from fastjax.parallel.hosts import to_host
from fastjax.weights.errors import CheckpointNotFoundError, listing
from fastjax.weights.staging import staged_directory

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SAVED_NAMES = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG_FILE).is_file()


def peft_config(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    targets = lora.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": lora.use_rslora,
        "layers_to_transform": None if lora.layers_to_transform is None else list(lora.layers_to_transform),
        "modules_to_save": list(lora.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _pair_names(layer: int, projection: str) -> tuple[str, str]:
    stem = f"{PREFIX}model.layers.{layer}.{projection}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _trained_layers(lora: LoRA) -> list[int]:
    return [layer for layer, scale in enumerate(np.asarray(lora.scale[...])) if scale != 0]


def adapter_tensors(model: Llama, lora: LoraConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The adapter's tensors by PEFT's names, float32."""
    for projection, module in lora_modules(model).items():
        a, b = to_host(module.a[...]), to_host(module.b[...])
        for layer in _trained_layers(module):
            a_name, b_name = _pair_names(layer, projection)
            yield a_name, np.ascontiguousarray(a[layer].T)
            yield b_name, np.ascontiguousarray(b[layer].T)
    for name in lora.modules_to_save:
        yield PREFIX + SAVED_NAMES[name], to_host(getattr(model, name).weight[...])


def save_adapter(directory: Path, model: Llama, lora: LoraConfig, base_model: str) -> None:
    """Write the adapter, whole or not at all. Every process takes part in collecting it; one writes."""
    tensors = dict(adapter_tensors(model, lora))
    if not is_writer():
        return
    with staged_directory(directory) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(json.dumps(peft_config(lora, base_model), indent=2) + "\n")


def read_adapter_config(directory: Path) -> tuple[LoraConfig, str]:
    """The LoRA options and the base model's name, from adapter_config.json."""
    path = directory / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path} has peft_type {raw.get('peft_type')!r}; fastjax reads LORA adapters.")
    _refuse_unsupported(path, raw)
    names = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "layers_to_transform",
        "modules_to_save",
        "bias",
    )
    options = {name: raw[name] for name in names if name in raw}
    if isinstance(options.get("target_modules"), list):
        options["target_modules"] = sorted(options["target_modules"])
    return LoraConfig.create(**options), raw.get("base_model_name_or_path") or ""


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """Options of PEFT that change the adapter's meaning and are not implemented must not be passed over."""
    changing = (
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "layer_replication",
        "exclude_modules",
        "lora_bias",
    )
    used = [name for name in changing if raw.get(name)]
    if used:
        raise UserError(f"{path} uses {', '.join(used)}, which fastjax does not support.")


def load_adapter(directory: Path, model: Llama) -> LoraConfig:
    """Attach the adapter in a directory to a base model, ready to be used or trained further."""
    lora, _ = read_adapter_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    add_lora(model, lora)
    for projection, module in lora_modules(model).items():
        a, b = np.array(module.a[...]), np.array(module.b[...])
        for layer in _trained_layers(module):
            for stack, name in zip((a, b), _pair_names(layer, projection), strict=True):
                stack[layer] = _take(tensors, name, stack.shape[:0:-1], directory).T
        module.a[...], module.b[...] = jnp.asarray(a), jnp.asarray(b)
    for name in lora.modules_to_save:
        weight = getattr(model, name).weight
        saved = _take(tensors, PREFIX + SAVED_NAMES[name], weight[...].shape, directory)
        getattr(model, name).weight = nnx.Param(jnp.asarray(saved))
    if tensors:
        surplus = listing(sorted(tensors))
        raise UserError(f"{directory / WEIGHTS_FILE} holds tensors that its config does not ask for: {surplus}.")
    return lora


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} is missing; an adapter has its weights there (no .bin is ever loaded).")
    try:
        with safe_open(path, framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); copy it anew.") from error


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], directory: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{directory / WEIGHTS_FILE} lacks {name}, which its config asks for.")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(f"{directory / WEIGHTS_FILE}: {name} has shape {tensor.shape}; the base model takes {shape}.")
    return tensor
