"""A tiny model's checkpoint, as numpy arrays and as files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastjax.models import LlamaConfig, param_specs

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        attention_bias=True,
    )


@pytest.fixture
def tensors(config: LlamaConfig) -> Tensors:
    """Random bfloat16 tensors under their HF names."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(spec.shape).astype(ml_dtypes.bfloat16)
        for spec in param_specs(config).values()
        for name in spec.hf_names()
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes tensors with the safetensors package: one file, or one per mapping given and an index of them all."""

    def write_files(*shards: Mapping[str, np.ndarray]) -> Path:
        if len(shards) == 1:
            save_file(dict(shards[0]), tmp_path / "model.safetensors")
            return tmp_path
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(dict(shard), tmp_path / file)
            weight_map |= dict.fromkeys(shard, file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return tmp_path

    return write_files
