"""The model with a cache: prompts in, one token after the other out.

A layer is as in fastjax.models.decoder_layer, without what training keeps. Of the linears, a packed weight that meets no
more than a handful of rows is multiplied as it is packed; else it is unpacked first, as in training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.generate.cache import KVCache, written
from fastjax.models.decoder import layer_of
from fastjax.models.decoder_layer import DecoderLayer
from fastjax.models.layers import dense_matmul
from fastjax.models.llama import Llama
from fastjax.models.projection import Factors, multiply, room
from fastjax.models.rope import rope_frequencies
from pallas_kernels import rope_angles
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import attention_forward
from pallas_kernels.rms_norm import rms_norm_forward
from pallas_kernels.rope import rope_qkv
from pallas_kernels.swiglu import swiglu_forward


@dataclasses.dataclass(frozen=True)
class PreparedLayer:
    """A layer, and the LoRA factors of its linears side by side, in the order q/k/v, o, gate/up, down."""

    layer: DecoderLayer
    factors: tuple[Factors | None, ...]


def prepared_layers(model: Llama) -> list[PreparedLayer]:
    """All layers cut out of their stack, outside the loop over tokens: packed weights alone stay where they are."""
    definition, state = nnx.split(model.layers)

    def prepared(layer: DecoderLayer) -> PreparedLayer:
        attn, mlp = layer.self_attn, layer.mlp
        groups = attn.qkv, [attn.o_proj], mlp.gate_up, [mlp.down_proj]
        return PreparedLayer(layer, tuple(Factors.of(group, model.dtype) for group in groups))

    return [prepared(layer_of(definition, state, jnp.int32(index))) for index in range(model.config.num_layers)]


def extend(
    model: Llama,
    layers: list[PreparedLayer],
    cache: KVCache,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    *,
    first: bool,
) -> tuple[Float[Array, "B T H"], KVCache]:
    """Hidden states after the last norm, and the cache with the first `counts` tokens of each row added to it.

    `first` says that the cache is empty: the tokens then attend to each other alone.
    """
    batch, new = tokens.shape
    offsets = jnp.arange(new, dtype=jnp.int32)[None]
    positions = cache.lengths[:, None] + offsets
    # `dynamic` frequencies follow from the longest position: what only fills a row up must not stretch them
    real = jnp.where(offsets < counts[:, None], positions, 0)
    angles = rope_angles(positions, rope_frequencies(model.config.rope, model.config.head_dim, real))
    x = model.embed_tokens(tokens, model.dtype).reshape(batch * new, -1)
    keys, values = [], []
    for index, layer in enumerate(layers):
        x, *kv = cached_layer(layer, x, angles, cache.keys[index], cache.values[index], cache.lengths, first)
        keys.append(kv[0])
        values.append(kv[1])
    return model.norm(x.reshape(batch, new, -1)), KVCache(tuple(keys), tuple(values), cache.lengths + counts)


def cached_layer(
    prepared: PreparedLayer,
    x: Float[Array, "B*T H"],
    angles: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]],
    keys: Float[Array, "B K C D"],
    values: Float[Array, "B K C D"],
    lengths: Int[Array, "B"],
    first: bool,
) -> tuple[Float[Array, "B*T H"], Float[Array, "B K C D"], Float[Array, "B K C D"]]:
    """A layer's output, and its keys and values with the new ones written."""
    layer = prepared.layer
    attn, mlp, config = layer.self_attn, layer.mlp, layer.config
    of_qkv, of_o, of_gate_up, of_down = prepared.factors

    def normed(norm: nnx.Module, x: jax.Array, columns: int) -> jax.Array:
        return rms_norm_forward(x, norm.weight[...], norm.eps, room=columns)  # pyright: ignore[reportAttributeAccessIssue]

    qkv = multiply(attn.qkv, normed(layer.input_layernorm, x, room(attn.qkv)), of_qkv)
    q, k, v = rope_qkv(qkv, *angles, config.num_heads, config.num_kv_heads)
    keys, values = written(keys, k, lengths), written(values, v, lengths)
    o = attention_forward(q, k, v, causal=True)[0] if first else decode_attention(q, keys, values, lengths)
    o = jnp.pad(o.reshape(x.shape[0], -1), ((0, 0), (0, room([attn.o_proj]))))
    m = x + multiply([attn.o_proj], o, of_o)
    gate_up = multiply(mlp.gate_up, normed(layer.post_attention_layernorm, m, room(mlp.gate_up)), of_gate_up)
    h = swiglu_forward(gate_up, room=room([mlp.down_proj]))
    return m + multiply([mlp.down_proj], h, of_down), keys, values


def next_logits(model: Llama, hidden: Float[Array, "B T H"], counts: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Logits, in float32, of what follows the last of each row's `counts` tokens."""
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return dense_matmul(last, model.head_weight()).astype(jnp.float32)
