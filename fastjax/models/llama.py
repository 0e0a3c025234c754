"""Llama: declared parameters, a decoder layer, the model.

Data runs tokens [B, S] -> hidden [B, S, H] -> logits [B, S, V]. Weights of the decoder layers are stacked on a leading
axis; `scan_layers` chooses whether one compiled layer is looped over them or each layer is compiled in line. The
parameters are the same either way.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from fastjax.models.config import LlamaConfig
from fastjax.models.decoder import Gather, Plan, Runs, run_decoder
from fastjax.models.decoder_layer import DecoderLayer
from fastjax.models.draws import draw, places_of
from fastjax.models.layers import Embedding, Frozen, Linear, RMSNorm, Weights, dense_matmul
from fastjax.models.rope import default_positions, rope_frequencies
from fastjax.models.saved import Context
from fastjax.models.spec import ParamSpec
from fastjax.parallel.ring_attention import Ring
from fastjax.parallel.sequence import SequenceSplit
from pallas_kernels import rope_angles
from pallas_kernels.flash_attention import segment_metadata


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


def example_lengths(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Of each position, how many share its segment."""
    rows, length = segment_ids.shape
    counts = jnp.zeros((rows, length + 1), jnp.int32).at[jnp.arange(rows)[:, None], segment_ids].add(1)
    return jnp.take_along_axis(counts, segment_ids, axis=1)


def embedding_noise(
    key: jax.Array,
    alpha: float,
    x: Float[Array, "B S H"],
    lengths: Int[Array, "B S"],
    places: UInt32[Array, "B S"],
) -> Float[Array, "B S H"]:
    """NEFTune's: uniform within alpha / sqrt(tokens * H) of zero, the tokens being those of the example itself."""
    width = x.shape[-1]
    bound = alpha / jnp.sqrt(lengths.astype(jnp.float32) * width)
    drawn = 2 * draw(key, places.reshape(-1)).uniform(width) - 1
    return (drawn.reshape(x.shape) * bound[..., None]).astype(x.dtype)


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
        runs: Runs | None = None,
        gather: Gather | None = None,
        noise: tuple[jax.Array, float] | None = None,
        tensor: str | None = None,
        split: SequenceSplit | None = None,
        first_row: jax.Array | int = 0,
        rows_over: Sequence[str] = (),
    ) -> Float[Array, "B S H"]:
        """Hidden states after the last norm.

        Without `positions` they count from 0, anew in each segment. A `dropout_key` turns LoRA dropout on. `runs` and
        `gather` are as decoder.py says; without `runs` every layer keeps all that its backward pass needs. `noise` is a
        key and an alpha: NEFTune's noise on the embeddings. `tensor` is the mesh axis over which this model's parameters
        are divided, inside shard_map; with a `split` of rows, there too, the arguments are whole rows and the hidden states
        those of the device's own part of each; `first_row` is the first row's index in the batch of all devices, by which
        dropout and noise are drawn, and `rows_over` the axes that divide its rows: `dynamic` RoPE follows the longest.
        """
        one_segment = jnp.zeros_like(input_ids)
        if positions is None:
            positions = default_positions(input_ids.shape, segment_ids)
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim, positions, rows_over)
        lengths = None if noise is None else example_lengths(one_segment if segment_ids is None else segment_ids)
        places = places_of(input_ids.shape[0], input_ids.shape[1], first_row)
        if split is None:
            seen = None if segment_ids is None else segment_metadata(segment_ids)
        else:
            seen = Ring.of(split, segment_ids)
            input_ids, positions, places = split.own(input_ids), split.own(positions), split.own(places)
            lengths = None if lengths is None else split.own(lengths, fill=1)
        drops = None if dropout_key is None else places.reshape(-1)
        context = Context(*rope_angles(positions, frequencies), seen, drops, tensor)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        plan = Plan(runs or (("none", self.config.num_layers),), self.scan_layers)
        x = self.embed_tokens(input_ids, self.dtype, tensor)
        if noise is not None and lengths is not None:
            x += embedding_noise(*noise, x, lengths, places)
        x = run_decoder(self.layers, x.reshape(-1, x.shape[-1]), context, keys, plan, gather)
        return self.norm(x.reshape(*input_ids.shape, -1))

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits in float32."""
        hidden = self.hidden(input_ids, positions, segment_ids)
        return dense_matmul(hidden, self.head_weight()).astype(jnp.float32)
