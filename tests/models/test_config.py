"""Reading config.json: what is understood comes through, what is not is refused by name."""

from typing import Any

import pytest
from transformers import LlamaConfig as HFConfig

from fastjax.errors import UserError
from fastjax.models import LlamaConfig

RAW: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'.*default, linear, dynamic, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(RAW | change)


def test_defaults_are_transformers() -> None:
    ours = LlamaConfig.from_hf(RAW)
    theirs = HFConfig(**RAW)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_rope_before_and_since_transformers_5() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = RAW | {"rope_theta": 5e5, "rope_scaling": llama3 | {"rope_type": "llama3"}}
    new = RAW | {"rope_parameters": llama3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(old).rope.kind == "llama3"


def test_round_trip() -> None:
    config = LlamaConfig.from_hf(
        RAW
        | {
            "head_dim": 8,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
        }
    )
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_hf(HFConfig(**config.to_hf()).to_dict() | {"architectures": ["LlamaForCausalLM"]}) == config
