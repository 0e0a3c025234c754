"""A Llama's shape, read from a HF `config.json` and checked: what the code cannot do is refused here, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastjax.errors import UserError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched to longer contexts."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 2048  # the context that the scaling starts from

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "RopeConfig":
        """From a whole config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise UserError(f"config.json asks for RoPE scaling {kind!r}; supported are {', '.join(ROPE_TYPES)}.")
        absent = [key for key in ROPE_KEYS[kind] if key not in rope]
        if absent:
            raise UserError(f"config.json's RoPE scaling {kind!r} lacks {', '.join(absent)}; add what is missing.")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{rope['partial_rotary_factor']=} in config.json is not supported; only 1.0 is.")
        # dynamic scaling starts from the model's own context, whatever else the file says, as in transformers
        context = rope["original_max_position_embeddings"] if kind == "llama3" else raw.get("max_position_embeddings")
        return cls(
            theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            kind=kind,
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_position=int(context or 2048),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json."""
        values = {
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position,
        }
        return {"rope_type": self.kind, "rope_theta": self.theta} | {key: values[key] for key in ROPE_KEYS[self.kind]}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and options of a Llama. Frozen and hashable: it is static data of the compiled program."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}; check config.json.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"{self.head_dim=} must be even, as RoPE turns pairs; check config.json.")

    def share(self, devices: int) -> "LlamaConfig":
        """What each of so many devices has, between which heads, the MLP's columns and words are divided."""
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // devices,
            num_kv_heads=self.num_kv_heads // devices,
            intermediate_size=self.intermediate_size // devices,
            vocab_size=self.vocab_size // devices,
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "LlamaConfig":
        """From the contents of a HF config.json."""
        architecture = (raw.get("architectures") or [None])[0]
        if raw.get("model_type") != "llama" or architecture not in (None, "LlamaForCausalLM"):
            raise UserError(
                f"architecture {architecture or raw.get('model_type')!r} in config.json is not supported; "
                "fastjax loads LlamaForCausalLM (model_type 'llama')."
            )
        absent = [key for key in REQUIRED_KEYS if raw.get(key) is None]
        if absent:
            raise UserError(f"config.json lacks {', '.join(absent)}; is it a Llama's?")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {raw['hidden_act']!r} in config.json is not supported; a Llama uses 'silu'.")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(raw),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            initializer_range=raw.get("initializer_range", 0.02),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers (and `from_hf`) reads back as this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            # read by transformers before version 5
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "initializer_range": self.initializer_range,
        }
