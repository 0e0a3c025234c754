"""The model with a cache: prompts in, one token after the other out.

A layer is as in fastjax.models.decoder_layer, without what training keeps. Of the linears, a packed weight that meets no
more than a handful of rows is multiplied as it is packed; else it is unpacked first, as in training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.generate.cache import KVCache
from fastjax.models.decoder import layer_of
from fastjax.models.decoder_layer import DecoderLayer
from fastjax.models.layers import Linear, dense_matmul
from fastjax.models.llama import Llama
from fastjax.models.projection import Factors, multiply, room
from fastjax.models.rope import rope_frequencies
from pallas_kernels import rope_angles
from pallas_kernels.decode_attention import KVStack, append, decode_attention, turn_and_append
from pallas_kernels.flash_attention import attention_forward
from pallas_kernels.rms_norm import rms_norm_forward
from pallas_kernels.rope import rope_qkv
from pallas_kernels.swiglu import swiglu_forward


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedLayers:
    """All layers, and the LoRA factors of their linears side by side, in the order q/k/v, o, gate/up, down, stacked."""

    definition: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    state: nnx.State
    factors: tuple[Factors | None, ...]

    def layer(self, index: Int[Array, ""]) -> tuple[DecoderLayer, tuple[Factors | None, ...]]:
        """One of them; packed weights stay where they are."""
        return layer_of(self.definition, self.state, index), jax.tree.map(lambda x: x[index], self.factors)


def prepared_layers(model: Llama) -> PreparedLayers:
    """What a loop over tokens makes once, before it."""
    definition, state = nnx.split(model.layers)

    def factors(layer: DecoderLayer) -> tuple[Factors | None, ...]:
        return tuple(Factors.of(group, model.dtype) for group in linear_groups(layer))

    def of_one(_: None, index: jax.Array) -> tuple[None, tuple]:
        return None, factors(layer_of(definition, state, index))

    _, stacked = jax.lax.scan(of_one, None, jnp.arange(model.config.num_layers, dtype=jnp.int32))
    return PreparedLayers(definition, state, stacked)


def linear_groups(layer: DecoderLayer) -> tuple[list[Linear], ...]:
    """Those that read the same input, in the order of `PreparedLayers.factors`."""
    attn, mlp = layer.self_attn, layer.mlp
    return attn.qkv, [attn.o_proj], mlp.gate_up, [mlp.down_proj]


def extend(
    model: Llama,
    layers: PreparedLayers,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    *,
    first: bool,
) -> tuple[Float[Array, "B T H"], KVCache]:
    """Hidden states after the last norm, and the cache with the first `counts` tokens of each row added to it.

    `first` says that the cache is empty: the tokens then attend to each other alone. Layers are looped over, which takes a
    fraction of the time to compile that all of them in line take; the loop carries the stack of their keys and values, and
    each layer writes its own there.
    """
    batch, new = tokens.shape
    offsets = jnp.arange(new, dtype=jnp.int32)[None]
    positions = cache.lengths[:, None] + offsets
    # `dynamic` frequencies follow from the longest position: what only fills a row up must not stretch them
    real = jnp.where(offsets < counts[:, None], positions, 0)
    angles = rope_angles(positions, rope_frequencies(model.config.rope, model.config.head_dim, real))
    x = model.embed_tokens(tokens, model.dtype).reshape(batch * new, -1)

    def one_layer(index: jax.Array, carry: tuple[jax.Array, KVStack]) -> tuple[jax.Array, KVStack]:
        x, stack = carry
        return cached_layer(*layers.layer(index), x, angles, stack, index, cache.lengths, first)

    x, stack = jax.lax.fori_loop(0, model.config.num_layers, one_layer, (x, cache.stack))
    return model.norm(x.reshape(batch, new, -1)), KVCache(stack, cache.lengths + counts)


def cached_layer(
    layer: DecoderLayer,
    factors: tuple[Factors | None, ...],
    x: Float[Array, "B*T H"],
    angles: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]],
    stack: KVStack,
    index: Int[Array, ""],
    lengths: Int[Array, "B"],
    first: bool,
) -> tuple[Float[Array, "B*T H"], KVStack]:
    """A layer's output, and the stack with its new keys and values."""
    attn, mlp, config = layer.self_attn, layer.mlp, layer.config
    of_qkv, of_o, of_gate_up, of_down = factors

    def normed(norm: nnx.Module, x: jax.Array, columns: int) -> jax.Array:
        return rms_norm_forward(x, norm.weight[...], norm.eps, room=columns)  # pyright: ignore[reportAttributeAccessIssue]

    qkv = multiply(attn.qkv, normed(layer.input_layernorm, x, room(attn.qkv)), of_qkv)
    if first:
        q, k, v = rope_qkv(qkv, *angles, config.num_heads, config.num_kv_heads)
        stack = append(stack, index, k, v, lengths)
        o = attention_forward(q, k, v, causal=True)[0]
    else:
        q, stack = turn_and_append(stack, index, qkv, *angles, lengths)
        o = attend(q, stack, index, lengths)
    o = jnp.pad(o.reshape(x.shape[0], -1), ((0, 0), (0, room([attn.o_proj]))))
    m = x + multiply([attn.o_proj], o, of_o)
    gate_up = multiply(mlp.gate_up, normed(layer.post_attention_layernorm, m, room(mlp.gate_up)), of_gate_up)
    h = swiglu_forward(gate_up, room=room([mlp.down_proj]))
    return m + multiply([mlp.down_proj], h, of_down), stack


def attend(
    q: Float[Array, "B T N D"], stack: KVStack, index: Int[Array, ""], lengths: Int[Array, "B"]
) -> Float[Array, "B T N D"]:
    k_scales, v_scales = stack.key_scales, stack.value_scales
    return decode_attention(q, stack.keys, stack.values, lengths, k_scales=k_scales, v_scales=v_scales, layer=index)


def next_logits(model: Llama, hidden: Float[Array, "B T H"], counts: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Logits, in float32, of what follows the last of each row's `counts` tokens."""
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return dense_matmul(last, model.head_weight()).astype(jnp.float32)
