"""Llama: declared parameters, a decoder layer, the model.

Data runs tokens [B, S] -> hidden [B, S, H] -> logits [B, S, V]. Weights of the decoder layers are stacked on a leading
axis; `scan_layers` chooses whether one compiled layer is looped over them or each layer is compiled in line. The
parameters are the same either way.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.models.config import LlamaConfig
from fastjax.models.layers import Embedding, Frozen, Linear, RMSNorm, VariableType, Weights, dense_matmul
from fastjax.models.rope import default_positions, rope_frequencies
from fastjax.models.spec import ParamSpec
from fastjax.parallel.collectives import GATHERED
from pallas_kernels import apply_rope, flash_attention, rope_angles, swiglu

Recompute = Literal["none", "full"]


def param_specs(config: LlamaConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model by our name, in the order of a forward pass."""
    hidden, vocab, layers = config.hidden_size, config.vocab_size, config.num_layers
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    specs: dict[str, ParamSpec] = {}

    def per_layer(name: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any) -> None:
        specs[f"layers.{name}"] = ParamSpec(shape, axes, f"model.layers.{{layer}}.{name}", layers, **options)

    def linear(name: str, out: tuple[int, str], into: tuple[int, str], bias: bool) -> None:
        per_layer(f"{name}.weight", (out[0], into[0]), (out[1], into[1]), quantize=True)
        if bias:
            per_layer(f"{name}.bias", (out[0],), (out[1],), init="zeros")

    embed, mlp = (hidden, "embed"), (config.intermediate_size, "mlp")
    specs["embed_tokens.weight"] = ParamSpec((vocab, hidden), ("vocab", "embed"), "model.embed_tokens.weight")
    per_layer("input_layernorm.weight", (hidden,), ("norm",), init="ones")
    linear("self_attn.q_proj", (heads, "heads"), embed, config.attention_bias)
    linear("self_attn.k_proj", (kv_heads, "kv_heads"), embed, config.attention_bias)
    linear("self_attn.v_proj", (kv_heads, "kv_heads"), embed, config.attention_bias)
    linear("self_attn.o_proj", embed, (heads, "heads"), config.attention_bias)
    per_layer("post_attention_layernorm.weight", (hidden,), ("norm",), init="ones")
    linear("mlp.gate_proj", mlp, embed, config.mlp_bias)
    linear("mlp.up_proj", mlp, embed, config.mlp_bias)
    linear("mlp.down_proj", embed, mlp, config.mlp_bias)
    specs["norm.weight"] = ParamSpec((hidden,), ("norm",), "model.norm.weight", init="ones")
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = ParamSpec((vocab, hidden), ("vocab", "embed"), "lm_head.weight")
    return specs


def init_weights(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Random weights to train from scratch: normal with the config's initializer_range, norms one, biases zero."""
    specs = param_specs(config)
    weights = {}
    for (name, spec), subkey in zip(specs.items(), jax.random.split(key, len(specs)), strict=True):
        if spec.init == "normal":
            weights[name] = config.initializer_range * jax.random.normal(subkey, spec.stacked_shape, dtype)
        else:
            weights[name] = jnp.full(spec.stacked_shape, 1.0 if spec.init == "ones" else 0.0, dtype)
    return weights


def _split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, weights: Weights, name: str, variable: VariableType) -> None:
        self.config = config
        self.q_proj = Linear(weights, f"{name}.q_proj", variable)
        self.k_proj = Linear(weights, f"{name}.k_proj", variable)
        self.v_proj = Linear(weights, f"{name}.v_proj", variable)
        self.o_proj = Linear(weights, f"{name}.o_proj", variable)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        angles: tuple[jax.Array, jax.Array],
        segment_ids: Int[Array, "B S"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B S H"]:
        batch, length, _ = x.shape
        keys = _split_key(key, 4)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, length, -1, self.config.head_dim)

        q = apply_rope(heads(self.q_proj(x, keys[0])), *angles)
        k = apply_rope(heads(self.k_proj(x, keys[1])), *angles)
        v = heads(self.v_proj(x, keys[2]))
        mixed = cast(jax.Array, flash_attention(q, k, v, causal=True, segment_ids=segment_ids))
        return self.o_proj(mixed.reshape(batch, length, -1), keys[3])


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, name: str, variable: VariableType) -> None:
        self.gate_proj = Linear(weights, f"{name}.gate_proj", variable)
        self.up_proj = Linear(weights, f"{name}.up_proj", variable)
        self.down_proj = Linear(weights, f"{name}.down_proj", variable)

    def __call__(self, x: Float[Array, "B S H"], key: jax.Array | None) -> Float[Array, "B S H"]:
        keys = _split_key(key, 3)
        return self.down_proj(swiglu(self.gate_proj(x, keys[0]), self.up_proj(x, keys[1])), keys[2])


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each on a normed input and added to the residual."""

    def __init__(self, config: LlamaConfig, weights: Weights, name: str, variable: VariableType) -> None:
        norm = config.rms_norm_eps
        self.input_layernorm = RMSNorm(weights, f"{name}.input_layernorm", variable, norm)
        self.self_attn = Attention(config, weights, f"{name}.self_attn", variable)
        self.post_attention_layernorm = RMSNorm(weights, f"{name}.post_attention_layernorm", variable, norm)
        self.mlp = MLP(weights, f"{name}.mlp", variable)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        angles: tuple[jax.Array, jax.Array],
        segment_ids: Int[Array, "B S"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B S H"]:
        attention_key, mlp_key = _split_key(key, 2)
        x = x + self.self_attn(self.input_layernorm(x), angles, segment_ids, attention_key)
        return x + self.mlp(self.post_attention_layernorm(x), mlp_key)


class Llama(nnx.Module):
    """The model. `weights` are as `param_specs` declares them; `trainable` makes all of them `nnx.Param`s."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        *,
        dtype: Any = jnp.bfloat16,
        trainable: bool = False,
        scan_layers: bool = True,
    ) -> None:
        variable = nnx.Param if trainable else Frozen
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.scan_layers = scan_layers
        self.embed_tokens = Embedding(weights, "embed_tokens", variable)
        self.layers = DecoderLayer(config, weights, "layers", variable)
        self.norm = RMSNorm(weights, "norm", variable, config.rms_norm_eps)
        self.lm_head = nnx.data(None if config.tie_word_embeddings else Linear(weights, "lm_head", variable))

    def head_weight(self) -> Float[Array, "V H"]:
        """The output projection: `lm_head`, or the embedding where the two are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def hidden(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
        recompute: Recompute = "none",
        gather: Callable[[Any], Any] | None = None,
    ) -> Float[Array, "B S H"]:
        """Hidden states after the last norm.

        Without `positions` they count from 0, anew in each segment. A `dropout_key` turns LoRA dropout on.
        `recompute="full"` keeps only each layer's input for the backward pass. `gather` is applied to a layer's
        parameters before use: sharded training passes the collective that makes them whole.
        """
        if positions is None:
            positions = default_positions(jnp.zeros_like(input_ids) if segment_ids is None else segment_ids)
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim, positions)
        angles = rope_angles(positions, frequencies)
        definition, parameters = nnx.split(self.layers)

        def run_layer(x: jax.Array, layer: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
            state, key = layer
            layer_module = nnx.merge(definition, gather(state) if gather else state)
            return layer_module(x, angles, segment_ids, key), None

        if recompute == "full":
            run_layer = jax.checkpoint(run_layer, prevent_cse=not self.scan_layers)
        elif gather is not None:
            keep_all_else = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            run_layer = jax.checkpoint(run_layer, policy=keep_all_else, prevent_cse=not self.scan_layers)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        x = self.embed_tokens(input_ids, self.dtype)
        if self.scan_layers:
            x, _ = jax.lax.scan(run_layer, x, (parameters, keys))
        else:
            for layer in range(self.config.num_layers):
                x, _ = run_layer(x, jax.tree.map(lambda leaf, index=layer: leaf[index], (parameters, keys)))
        return self.norm(x)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits in float32."""
        hidden = self.hidden(input_ids, positions, segment_ids)
        return dense_matmul(hidden, self.head_weight()).astype(jnp.float32)
