"""The model with a cache: prompts in, one token after the other out.

A layer is as in fastjax.models.decoder_layer, without what training keeps. For a handful of rows it is put together from
ops of few launches, of which each would else cost more than what it computes: q/k/v and gate/up are one, LoRA's first
product is made with the input, its second and the residual join the linear's own (`token_layer`). Packed weights are
multiplied as they are packed there; with more rows they are unpacked first, as in training (`wide_layer`). Rows with
adapters of their own always take the former.

On a mesh this is what a device does with what it has of the model (`Share`): its heads with their keys and values, its
columns of the MLP, its words. Two sums over the devices of `tensor` in a layer make rows whole, as in training.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.generate.cache import KVCache
from fastjax.models.decoder import layer_of
from fastjax.models.decoder_layer import DecoderLayer
from fastjax.models.layers import Linear, RMSNorm, dense_matmul
from fastjax.models.llama import Llama
from fastjax.models.projection import apply_linears, room
from fastjax.models.rope import rope_frequencies
from pallas_kernels import rope_angles
from pallas_kernels.between_attentions import Layers, between_attentions, new_counts, obstacle
from pallas_kernels.decode_attention import LINES, KVStack, append, append_and_attend, chunk_attention
from pallas_kernels.flash_attention import attention_forward
from pallas_kernels.low_rank import norm_and_project, project, room_for, summands, swiglu_and_project
from pallas_kernels.low_rank.beside import Made
from pallas_kernels.nf4 import FEW, LowRank, NF4Array, NF4Slice, Ready, linears, padded_rank, ready, room_beside
from pallas_kernels.rms_norm import rms_norm_forward
from pallas_kernels.rope import rope_qkv
from pallas_kernels.swiglu import swiglu_forward

Attention = Callable[[jax.Array], tuple[jax.Array, KVStack]]


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device has of the model and of the batch's rows; by itself, all."""

    tensor: str | None = None  # the mesh axis that divides heads, the MLP's columns and words
    gather: Callable[[nnx.State], nnx.State] | None = None  # puts layers together that are divided further
    rows_over: tuple[str, ...] = ()  # the mesh axes that divide rows

    def summed(self, part: jax.Array) -> jax.Array:
        """What each device of `tensor` has a summand of."""
        return part if self.tensor is None else jax.lax.psum(part, self.tensor)


ALONE = Share()


class Group(NamedTuple):
    """Of linears that read the same input, for all layers: LoRA's factors, and what their product reads beside codes."""

    factors: LowRank | None
    ready: Ready | None


@dataclasses.dataclass(frozen=True)
class PreparedLayers:
    """All layers, and what is made of q/k/v, o, gate/up and down."""

    definition: nnx.GraphDef
    state: nnx.State
    groups: tuple[Group, ...]
    share: Share

    @property
    def stack(self) -> DecoderLayer:
        """Every parameter with a leading layer axis."""
        return nnx.merge(self.definition, self.state)

    def layer(self, index: Int[Array, ""]) -> DecoderLayer:
        """One of them; packed weights stay where they are."""
        return layer_of(self.definition, self.state, index)

    def at(self, index: Int[Array, ""], dtype: Any) -> "tuple[PreparedLayers, Int[Array, '']]":
        """Where a device can work with a layer: here, or where it has only a part, in a stack of that layer alone."""
        if self.share.gather is None:
            return self, index
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), self.state)
        whole = nnx.merge(self.definition, self.share.gather(one))
        return with_factors(whole, dtype, dataclasses.replace(self.share, gather=None)), jnp.zeros_like(index)


def prepared_layers(model: Llama, share: Share = ALONE, rows: int = 0) -> PreparedLayers:
    """What a loop over tokens makes once, before it, each of so many rows."""
    if share.gather is not None:
        return PreparedLayers(*nnx.split(model.layers), (), share)
    return with_factors(model.layers, model.dtype, share, rows)


def with_factors(layers: DecoderLayer, dtype: Any, share: Share, rows: int = 0) -> PreparedLayers:
    attn, mlp = layers.self_attn, layers.mlp
    groups = attn.qkv, [attn.o_proj], mlp.gate_up, [mlp.down_proj]

    def made(group: Sequence[Linear]) -> Group:
        factors = low_rank(group, dtype)
        weights = [taken(linear.weight.get_value(), jnp.int32(0)) for linear in group]
        x = jax.ShapeDtypeStruct((rows, weights[0].shape[1]), dtype)
        return Group(factors, ready(weights, factors and factors.b, x))

    return PreparedLayers(*nnx.split(layers), tuple(made(group) for group in groups), share)


def low_rank(linears: Sequence[Linear], dtype: Any) -> LowRank | None:
    """The factors of linears with a layer axis; None if none of them has LoRA."""
    rank = padded_rank(max(0 if linear.lora is None else linear.lora.a.shape[-1] for linear in linears))
    if not rank:
        return None
    parts = []
    for linear in linears:
        layers, out, into = linear.weight.get_value().shape
        if linear.lora is None:
            a, b = jnp.zeros((layers, rank, into), dtype), jnp.zeros((layers, out, rank), dtype)
        else:
            spare = rank - linear.lora.a.shape[-1]
            # of each layer, or of each column too, where several adapters lie side by side
            scale = linear.lora.scale[...].reshape(layers, 1, -1)
            a = (linear.lora.a[...] * scale).swapaxes(1, 2).astype(dtype)
            b = linear.lora.b[...].swapaxes(1, 2).astype(dtype)
            a, b = jnp.pad(a, ((0, 0), (0, spare), (0, 0))), jnp.pad(b, ((0, 0), (0, 0), (0, spare)))
        parts.append((a, b))
    a, b = (jnp.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    if len(linears) == 1:  # z is made in summands, each of which meets b
        b = jnp.tile(b, (1, 1, summands(room_for(rank), rank)))
    return LowRank(a, b)


def extend(
    model: Llama,
    layers: PreparedLayers,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    *,
    first: bool,
    own: Float[Array, "B R"] | None = None,
) -> tuple[Float[Array, "B T H"], KVCache]:
    """Hidden states after the last norm, and the cache with the first `counts` tokens of each row added to it.

    `first` says that the cache is empty: the tokens then attend to each other alone. `own` are the columns of LoRA that each
    row keeps, where the model carries several adapters (see adapters.py). Layers are looped over, so
    that one is compiled and not all; the loop carries the stack of their keys and values, and
    each layer writes its own there.
    """
    batch, new = tokens.shape
    offsets = jnp.arange(new, dtype=jnp.int32)[None]
    positions = cache.lengths[:, None] + offsets
    # `dynamic` frequencies follow from the longest position: what only fills a row up must not stretch them
    real = jnp.where(offsets < counts[:, None], positions, 0)
    share = layers.share
    angles = rope_angles(positions, rope_frequencies(model.config.rope, model.config.head_dim, real, share.rows_over))
    x = model.embed_tokens(tokens, model.dtype, share.tensor).reshape(batch * new, -1)

    if own is not None:
        own = jnp.repeat(own.astype(model.dtype), new, axis=0)

    attention = partial(attend, angles, lengths=cache.lengths, counts=counts, first=first)

    def one_layer(index: jax.Array, carry: tuple[jax.Array, KVStack]) -> tuple[jax.Array, KVStack]:
        x, stack = carry
        here, at = layers.at(index, model.dtype)
        if own is None and (first or batch * new > FEW):
            return wide_layer(here.layer(at), x, partial(attention, stack, index), share.tensor)
        return token_layer(here, at, x, partial(attention, stack, index), own)

    together = None if first or own is not None else in_two_launches(layers, x)
    if together is None:
        x, stack = jax.lax.fori_loop(0, model.config.num_layers, one_layer, (x, cache.stack))
    else:
        x, stack = through_layers(layers, together, x, cache.stack, attention)
    return model.norm(x.reshape(batch, new, -1)), KVCache(stack, cache.lengths + counts)


def wide_layer(
    layer: DecoderLayer, x: Float[Array, "B*T H"], attention: Attention, tensor: str | None
) -> tuple[Float[Array, "B*T H"], KVStack]:
    """A layer's output, and the stack with its new keys and values. `tensor`: the mesh axis that divides it."""
    attn, mlp = layer.self_attn, layer.mlp

    def normed(norm: RMSNorm, x: jax.Array, columns: int) -> jax.Array:
        return rms_norm_forward(x, norm.weight[...], norm.eps, room=columns)

    def multiply(linears: Sequence[Linear], x: jax.Array, sum_over: str | None = None) -> jax.Array:
        return apply_linears(linears, x, [None] * len(linears), sum_over=sum_over)[0]

    qkv = multiply(attn.qkv, normed(layer.input_layernorm, x, room(attn.qkv)))
    o, stack = attention(qkv)
    o = jnp.pad(o, ((0, 0), (0, room([attn.o_proj]))))
    m = x + multiply([attn.o_proj], o, tensor)
    gate_up = multiply(mlp.gate_up, normed(layer.post_attention_layernorm, m, room(mlp.gate_up)))
    h = swiglu_forward(gate_up, room=room([mlp.down_proj]))
    return m + multiply([mlp.down_proj], h, tensor), stack


@dataclasses.dataclass(frozen=True)
class TokenLinears:
    """The linears of a layer for few rows, with what comes before each. `own`: see `extend`."""

    layers: PreparedLayers
    index: Int[Array, ""]
    own: Float[Array, "B*T R"] | None

    def weights(self, group: Sequence[Linear]) -> list[NF4Slice | jax.Array]:
        return [taken(linear.weight.get_value(), self.index) for linear in group]

    def space(self, group: Sequence[Linear], x: jax.Array, prepared: Group) -> int:
        """For LoRA's product in the linears' input; rows with adapters of their own change it before it is used."""
        factors = prepared.factors
        return 0 if factors is None or self.own is not None else room_beside(x, self.weights(group), factors.a.shape[1])

    def normed(self, norm: RMSNorm, x: jax.Array, group: Sequence[Linear], prepared: Group) -> Made:
        spare = self.space(group, x, prepared)
        return norm_and_project(x, norm.weight[...], norm.eps, a_of(prepared), self.index, room=spare)

    def multiply(
        self, group: Sequence[Linear], made: Made, prepared: Group, residual: jax.Array | None = None
    ) -> jax.Array:
        u, z = made
        factors, share = prepared.factors, self.layers.share
        if z is not None and self.own is not None:
            z *= jnp.tile(self.own, (1, z.shape[1] // self.own.shape[1]))
        offset = biases(group, self.index, u)
        added = residual if offset is None else offset if residual is None else residual + offset
        b = factors and factors.b
        product = partial(linears, u, self.weights(group), z=z, b=b, layer=self.index, made=prepared.ready)
        if residual is None or added is None or share.tensor is None:
            return product(residual=added)
        # what a device has is a summand, to which the residual is added once
        return share.summed(product()) + added

    def qkv(self, x: Float[Array, "B*T H"]) -> Float[Array, "B*T (N+2K)*D"]:
        every, prepared = self.layers.stack, self.layers.groups[0]
        group = every.self_attn.qkv
        return self.multiply(group, self.normed(every.input_layernorm, x, group, prepared), prepared)


def token_layer(
    layers: PreparedLayers,
    index: Int[Array, ""],
    x: Float[Array, "B*T H"],
    attention: Attention,
    own: Float[Array, "B*T R"] | None,
) -> tuple[Float[Array, "B*T H"], KVStack]:
    """The same for few rows."""
    every, by = layers.stack, TokenLinears(layers, index, own)
    attn, mlp = every.self_attn, every.mlp
    _, of_o, of_gate_up, of_down = layers.groups
    o, stack = attention(by.qkv(x))
    o = project(o, a_of(of_o), index, room=by.space([attn.o_proj], o, of_o), parts=parts_of(of_o))
    m = by.multiply([attn.o_proj], o, of_o, x)
    u = by.normed(every.post_attention_layernorm, m, mlp.gate_up, of_gate_up)
    gate_up = by.multiply(mlp.gate_up, u, of_gate_up)
    spare = by.space([mlp.down_proj], gate_up, of_down)
    h = swiglu_and_project(gate_up, a_of(of_down), index, room=spare, parts=parts_of(of_down))
    return by.multiply([mlp.down_proj], h, of_down, m), stack


def in_two_launches(layers: PreparedLayers, x: Float[Array, "B*T H"]) -> Layers | None:
    """All layers as `between_attentions` takes them, if it can: then a layer is that and its attention."""
    if layers.share.gather is not None or layers.share.tensor is not None:
        return None
    every = layers.stack
    attn, mlp = every.self_attn, every.mlp
    groups = [attn.o_proj], mlp.gate_up, [mlp.down_proj], attn.qkv
    if any(linear.bias is not None for group in groups for linear in group):
        return None
    of_qkv, of_o, of_gate_up, of_down = (group.factors for group in layers.groups)
    both = every.post_attention_layernorm, every.input_layernorm
    together = Layers(
        tuple([linear.weight.get_value() for linear in group] for group in groups),
        (of_o, of_gate_up, of_down, of_qkv),
        *(norm.weight[...] for norm in both),
        eps=every.input_layernorm.eps,
    )
    return together if obstacle(x, together) is None else None


def through_layers(
    layers: PreparedLayers,
    together: Layers,
    x: Float[Array, "B*T H"],
    stack: KVStack,
    attention: Callable[..., tuple[jax.Array, KVStack]],
) -> tuple[Float[Array, "B*T H"], KVStack]:
    """All layers, each in two launches."""

    def one_layer(index: jax.Array, carry: tuple) -> tuple:
        x, qkv, counts, stack = carry
        o, stack = attention(stack, index, qkv)
        return *between_attentions(x, o, together, index, counts), stack

    count = together.mlp_norm.shape[0]
    first = TokenLinears(layers, jnp.int32(0), None).qkv(x)
    x, _, _, stack = jax.lax.fori_loop(0, count, one_layer, (x, first, new_counts(count), stack))
    return x, stack


def a_of(prepared: Group) -> Float[Array, "L n*R in"] | None:
    return prepared.factors and prepared.factors.a


def parts_of(prepared: Group) -> int:
    """How many summands of z a linear by itself takes."""
    return 1 if prepared.factors is None else prepared.factors.b.shape[-1] // prepared.factors.a.shape[1]


def taken(weight: NF4Array | Float[Array, "L out in"], index: Int[Array, ""]) -> NF4Slice | Float[Array, "out in"]:
    return NF4Slice(weight, index) if isinstance(weight, NF4Array) else weight[index]


def biases(group: Sequence[Linear], index: Int[Array, ""], x: Float[Array, "m in"]) -> Float[Array, "m out"] | None:
    """A layer's, side by side in every row; None if no linear has one."""
    if all(linear.bias is None for linear in group):
        return None
    widths = [linear.weight.get_value().shape[-2] for linear in group]
    parts = [
        jnp.zeros(width, x.dtype) if linear.bias is None else linear.bias[...][index].astype(x.dtype)
        for linear, width in zip(group, widths, strict=True)
    ]
    return jnp.broadcast_to(jnp.concatenate(parts)[None], (x.shape[0], sum(widths)))


def attend(
    angles: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]],
    stack: KVStack,
    index: Int[Array, ""],
    qkv: Float[Array, "B*T (N+2K)*D"],
    *,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    first: bool,
) -> tuple[Float[Array, "B*T N*D"], KVStack]:
    """The attention of new positions, and the stack with their keys and values."""
    kv_heads, depth = stack.keys.shape[2], stack.keys.shape[4]
    heads, new = qkv.shape[1] // depth - 2 * kv_heads, angles[0].shape[1]
    many = (
        new * heads // kv_heads > LINES and stack.capacity % new == 0
    )  # a part of a prompt, not tokens that are tried
    if first or many:
        q, k, v = rope_qkv(qkv, *angles, heads, kv_heads)
        stack = append(stack, index, k, v, lengths)
        if first:
            o = attention_forward(q, k, v, causal=True)[0]
        else:
            o = chunk_attention(q, k, v, stack, index, lengths, counts)
    else:
        o, stack = append_and_attend(stack, index, qkv, *angles, lengths)
    return o.reshape(qkv.shape[0], -1), stack


def next_logits(
    model: Llama, hidden: Float[Array, "B T H"], counts: Int[Array, "B"], share: Share = ALONE
) -> Float[Array, "B V"]:
    """Logits, in float32, of what follows the last of each row's `counts` tokens."""
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return all_logits(model, last, share)


def all_logits(model: Llama, hidden: Float[Array, "... H"], share: Share = ALONE) -> Float[Array, "... V"]:
    """In float32, of all words, of which a device of `tensor` has some."""
    logits = dense_matmul(hidden, model.head_weight()).astype(jnp.float32)
    return (
        logits if share.tensor is None else jax.lax.all_gather(logits, share.tensor, axis=logits.ndim - 1, tiled=True)
    )
