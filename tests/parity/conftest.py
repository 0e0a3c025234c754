"""Tiny random HF Llamas on disk, and the torch model that made each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MakeModel = Callable[..., tuple[Path, LlamaForCausalLM]]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model(**config) -> (checkpoint directory, torch model in float32, in eval mode)."""

    def make(**overrides: Any) -> tuple[Path, LlamaForCausalLM]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (
                    "norm" in name or "bias" in name
                ):  # as initialised they are ones and zeros, which would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base", model

    return make
