"""A decoder layer, forward and backward by hand: what backward keeps is chosen here, not found by autodiff.

Rows are tokens, T = B S of them, and W are linears with their LoRA:

    u = norm_1(x)        [q k v] = u W_qkv, q and k turned        o = attend(q, k, v)       m = x + o W_o
    n = norm_2(m)        [gate up] = n W_gu                       h = silu(gate) up         y = m + h W_d

Kept for the backward pass: x, q, k, v, o with its log-sum-exp, m, [gate up] and LoRA's low-rank products, which is all
that would take a large matrix product to make again. u, n and h are made again.

A layer may keep less: x alone, or x with o, or with q, k, v and o. The first half is then run again from there, and the
second, whose rows know nothing of each other, PART tokens at a time: of its arrays, the widest of the layer, only a part
is ever there. An unpacked weight is made anew for each part, which at PART tokens costs a few hundredths of the products
it is for.

On a mesh with an axis `tensor` a device has some of the heads and some of the MLP's columns (rows of W_qkv and W_gu,
columns of W_o and W_d), and does above what concerns them; x, m, y and their gradients are whole everywhere. Four sums
over the devices make them so, two in either pass: of o W_o and h W_d, and of the gradients of u and n.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.models.config import LlamaConfig
from fastjax.models.draws import Draw, draw
from fastjax.models.layers import Linear, RMSNorm, VariableType, Weights
from fastjax.models.projection import (
    Draws,
    apply_linears,
    columns_of,
    input_gradient,
    inputs_of,
    parameter_gradients,
    room,
)
from fastjax.models.saved import Attended, Context, Saved, SavedAttention, SavedMLP, Turned
from fastjax.parallel.ring_attention import Ring, RingSaved, ring_attention_backward, ring_attention_forward
from pallas_kernels.flash_attention import (
    AttentionSaved,
    attention_backward,
    attention_forward,
    attention_known,
)
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_dweight, rms_norm_forward
from pallas_kernels.rope import rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

PART = 8192  # tokens that go through the second half at once where a layer is run again
TILE = 128  # a part is a multiple of it


class Attention(nnx.Module):
    """The linears of grouped-query attention."""

    def __init__(self, weights: Weights, name: str, variable: VariableType) -> None:
        self.q_proj = Linear(weights, f"{name}.q_proj", variable)
        self.k_proj = Linear(weights, f"{name}.k_proj", variable)
        self.v_proj = Linear(weights, f"{name}.v_proj", variable)
        self.o_proj = Linear(weights, f"{name}.o_proj", variable)

    @property
    def qkv(self) -> list[Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]


class MLP(nnx.Module):
    """The linears of down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, name: str, variable: VariableType) -> None:
        self.gate_proj = Linear(weights, f"{name}.gate_proj", variable)
        self.up_proj = Linear(weights, f"{name}.up_proj", variable)
        self.down_proj = Linear(weights, f"{name}.down_proj", variable)

    @property
    def gate_up(self) -> list[Linear]:
        return [self.gate_proj, self.up_proj]


class DecoderLayer(nnx.Module):
    """The parameters of one layer, or of a stack of them, each with a leading layer axis."""

    def __init__(self, config: LlamaConfig, weights: Weights, name: str, variable: VariableType) -> None:
        self.config = config
        self.input_layernorm = RMSNorm(weights, f"{name}.input_layernorm", variable, config.rms_norm_eps)
        self.self_attn = Attention(weights, f"{name}.self_attn", variable)
        self.post_attention_layernorm = RMSNorm(
            weights, f"{name}.post_attention_layernorm", variable, config.rms_norm_eps
        )
        self.mlp = MLP(weights, f"{name}.mlp", variable)


def layer_forward(
    layer: DecoderLayer, x: Float[Array, "T H"], context: Context, key: jax.Array | None
) -> tuple[Float[Array, "T H"], Saved]:
    """y, and what `layer_backward` needs. `key` turns LoRA dropout on."""
    draws = _draws(layer, context, key)
    m, first = attention_half(layer, x, context, draws)
    y, second = mlp_half(layer, m, context, draws)
    return y, Saved(first, m, second)


def layer_output(
    layer: DecoderLayer, x: Float[Array, "T H"], context: Context, key: jax.Array | None
) -> tuple[Float[Array, "T H"], SavedAttention]:
    """y and what its first half saved, with little of the second in memory at once: where backward runs it again."""
    draws = _draws(layer, context, key)
    m, first = attention_half(layer, x, context, draws)
    parts = parts_of(m.shape[0])
    if parts == 1:
        return mlp_half(layer, m, context, draws)[0], first

    def one_part(part: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        m, places = part
        return mlp_half(layer, m, context, _at(draws, places))[0]

    return jax.lax.map(one_part, _in_parts(parts, m, context.places)).reshape(m.shape), first


def layer_backward(
    layer: DecoderLayer,
    gradients: DecoderLayer,
    saved: Saved,
    context: Context,
    key: jax.Array | None,
    dy: Float[Array, "T H+room"],
) -> Float[Array, "T H+room"]:
    """dx. Every trained parameter finds its gradient set in `gradients`, a module like the layer.

    dy and dx have the room that `carried_room` names at the end of their rows.
    """
    draws = _draws(layer, context, key)
    dm = mlp_half_backward(layer, gradients, saved.m, saved.second, context, draws, dy)
    return attention_half_backward(layer, gradients, saved.first, context, draws, dm)


def layer_backward_again(
    layer: DecoderLayer,
    gradients: DecoderLayer,
    x: Float[Array, "T H"],
    attended: Attended | None,
    context: Context,
    key: jax.Array | None,
    dy: Float[Array, "T H+room"],
) -> Float[Array, "T H+room"]:
    """The same from the layer's input: its first half is run again, the second a part of the tokens at a time."""
    draws = _draws(layer, context, key)
    m, first = attention_half(layer, x, context, draws, attended)
    parts = parts_of(m.shape[0])
    if parts == 1:
        dm = mlp_half_backward(layer, gradients, m, mlp_half(layer, m, context, draws)[1], context, draws, dy)
    else:
        dm = _mlp_half_backward_in_parts(layer, gradients, m, context, draws, dy, parts)
    return attention_half_backward(layer, gradients, first, context, draws, dm)


def attention_half(
    layer: DecoderLayer, x: Float[Array, "T H"], context: Context, draws: Draws, attended: Attended | None = None
) -> tuple[Float[Array, "T H"], SavedAttention]:
    """m, and what its backward pass needs; of that, what is in `attended` need not be made."""
    attn = layer.self_attn
    if attended is None:
        q, k, v, z_qkv = _turned_qkv(layer, x, context, draws)
        o, attention = _attend(q, k, v, context)
    else:
        q, k, v, z_qkv = attended.qkv or _turned_qkv(layer, x, context, draws)
        o, attention = attended.out, _attention_known(q, k, v, attended, context)
    mixed, z_o = apply_linears([attn.o_proj], _rows(o, room([attn.o_proj])), draws[3:4], sum_over=context.tensor)
    return x + mixed, SavedAttention(x, attention, (z_qkv, z_o))


def _turned_qkv(layer: DecoderLayer, x: Float[Array, "T H"], context: Context, draws: Draws) -> Turned:
    attn = layer.self_attn
    u = _norm(layer.input_layernorm, x, room(attn.qkv))
    qkv, z_qkv = apply_linears(attn.qkv, u, draws[:3])
    heads, kv_heads = (columns_of(linear) // layer.config.head_dim for linear in (attn.q_proj, attn.k_proj))
    return *rope_qkv(qkv, context.cos, context.sin, heads, kv_heads), z_qkv


def attention_half_backward(
    layer: DecoderLayer,
    gradients: DecoderLayer,
    saved: SavedAttention,
    context: Context,
    draws: Draws,
    dm: Float[Array, "T H+room"],
) -> Float[Array, "T H+room"]:
    attn, attn_grad = layer.self_attn, gradients.self_attn
    z_qkv, z_o = saved.low_rank

    linears, grads = [attn.o_proj], [attn_grad.o_proj]
    do, dm = input_gradient(linears, grads, z_o, dm, draws[3:4])
    parameter_gradients(linears, grads, _rows(saved.attention.out), dm, draws[3:4])

    do = do.reshape(*context.cos.shape[:2], -1, layer.config.head_dim)
    dq, dk, dv = _attend_backward(saved.attention, do, context)
    dqkv = rope_qkv_backward(dq, dk, dv, context.cos, context.sin, room=room(attn.qkv))
    du, dqkv = input_gradient(attn.qkv, attn_grad.qkv, z_qkv, dqkv, draws[:3], sum_over=context.tensor)
    parameter_gradients(attn.qkv, attn_grad.qkv, _norm(layer.input_layernorm, saved.x), dqkv, draws[:3])
    return _norm_backward(layer.input_layernorm, gradients.input_layernorm, saved.x, du, dm, carried_room(layer))


def mlp_half(
    layer: DecoderLayer, m: Float[Array, "T H"], context: Context, draws: Draws
) -> tuple[Float[Array, "T H"], SavedMLP]:
    """y, and what its backward pass needs beside m."""
    mlp = layer.mlp
    n = _norm(layer.post_attention_layernorm, m, room(mlp.gate_up))
    gate_up, z_gate_up = apply_linears(mlp.gate_up, n, draws[4:6])
    h = swiglu_forward(gate_up, room=room([mlp.down_proj]))
    down, z_down = apply_linears([mlp.down_proj], h, draws[6:], sum_over=context.tensor)
    return m + down, SavedMLP(gate_up, (z_gate_up, z_down))


def mlp_half_backward(
    layer: DecoderLayer,
    gradients: DecoderLayer,
    m: Float[Array, "T H"],
    saved: SavedMLP,
    context: Context,
    draws: Draws,
    dy: Float[Array, "T H+room"],
) -> Float[Array, "T H+room"]:
    mlp, mlp_grad = layer.mlp, gradients.mlp
    z_gate_up, z_down = saved.low_rank

    linears, grads = [mlp.down_proj], [mlp_grad.down_proj]
    dh, dy = input_gradient(linears, grads, z_down, dy, draws[6:])
    dgate_up, h = swiglu_backward(saved.gate_up, dh, room=room(mlp.gate_up))
    parameter_gradients(linears, grads, h, dy, draws[6:])

    linears, grads = mlp.gate_up, mlp_grad.gate_up
    dn, dgate_up = input_gradient(linears, grads, z_gate_up, dgate_up, draws[4:6], sum_over=context.tensor)
    parameter_gradients(linears, grads, _norm(layer.post_attention_layernorm, m), dgate_up, draws[4:6])
    norm, norm_grad = layer.post_attention_layernorm, gradients.post_attention_layernorm
    return _norm_backward(norm, norm_grad, m, dn, dy, room([layer.self_attn.o_proj]))


def _mlp_half_backward_in_parts(
    layer: DecoderLayer,
    gradients: DecoderLayer,
    m: Float[Array, "T H"],
    context: Context,
    draws: Draws,
    dy: Float[Array, "T H+room"],
    parts: int,
) -> Float[Array, "T H+room"]:
    """What no part keeps for another: [gate up], h and their gradients, the widest arrays of a layer."""
    definition, unset, others = nnx.split(gradients, nnx.Param, ...)

    def one_part(m: jax.Array, dy: jax.Array, places: jax.Array | None) -> tuple[nnx.State, jax.Array]:
        draws_here = _at(draws, places)
        own = nnx.merge(definition, jax.tree.map(lambda x: x, unset), others)  # variables that this trace may set
        saved = mlp_half(layer, m, context, draws_here)[1]
        dm = mlp_half_backward(layer, own, m, saved, context, draws_here, dy)
        return nnx.state(own, nnx.Param), dm

    def add(sums: nnx.State, part: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[nnx.State, jax.Array]:
        found, dm = one_part(*part)
        return jax.tree.map(jnp.add, sums, found), dm

    in_parts = _in_parts(parts, m, dy, context.places)
    shapes, _ = jax.eval_shape(one_part, *jax.tree.map(lambda x: x[0], in_parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, dm = jax.lax.scan(add, zeros, in_parts)
    nnx.update(gradients, sums)
    return dm.reshape(m.shape[0], -1)


def _in_parts(parts: int, *rows: jax.Array | None) -> Any:
    """Arrays of all tokens, each with a leading axis of parts of them."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)


def _at(draws: Draws, places: jax.Array | None) -> Draws:
    """What is drawn for some of the tokens."""
    if places is None:
        return draws
    return [None if draw is None else dataclasses.replace(draw, places=places) for draw in draws]


def parts_of(tokens: int) -> int:
    """The fewest equal parts, of whole tiles, of at most PART tokens; one where there are none."""
    fewest = -(-tokens // PART)
    return next((n for n in range(fewest, 4 * fewest) if tokens % (n * TILE) == 0), 1)


def carried_room(layer: DecoderLayer) -> int:
    """Columns that a gradient between layers has past the hidden ones."""
    return room([layer.mlp.down_proj])


def _attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], context: Context
) -> tuple[Float[Array, "B S N D"], AttentionSaved | RingSaved]:
    if isinstance(context.seen, Ring):
        return ring_attention_forward(q, k, v, context.seen)
    return attention_forward(q, k, v, causal=True, segment_ids=context.seen)


def _attention_known(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    attended: Attended,
    context: Context,
) -> AttentionSaved | RingSaved:
    """What `_attend` saved of the same."""
    if isinstance(context.seen, Ring):
        return RingSaved(q, k, v, attended.out, attended.lse)
    return attention_known(q, k, v, attended.out, attended.lse, causal=True, segment_ids=context.seen)


def _attend_backward(
    saved: AttentionSaved | RingSaved, do: Float[Array, "B S N D"], context: Context
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if isinstance(saved, RingSaved):
        assert isinstance(context.seen, Ring)
        return ring_attention_backward(saved, do, context.seen)
    return attention_backward(saved, do)


def _rows(o: Float[Array, "B S N D"], columns: int = 0) -> Float[Array, "T N*D+columns"]:
    return jnp.pad(o.reshape(o.shape[0] * o.shape[1], -1), ((0, 0), (0, columns)))


def _norm(norm: RMSNorm, x: jax.Array, columns: int = 0) -> jax.Array:
    return rms_norm_forward(x, norm.weight[...], norm.eps, room=columns)


def _norm_backward(
    norm: RMSNorm, gradient: RMSNorm, x: jax.Array, g: jax.Array, residual: jax.Array, columns: int
) -> jax.Array:
    """dx through a norm, plus the gradient that reached x past it."""
    weight = norm.weight[...]
    if isinstance(norm.weight, nnx.Param):
        gradient.weight.set_value(rms_norm_dweight(x, norm.eps, g).astype(weight.dtype))
    return rms_norm_backward(x, weight, norm.eps, g, residual, room=columns)


def _draws(layer: DecoderLayer, context: Context, key: jax.Array | None) -> list[Draw | None]:
    """One a linear, in the order q, k, v, o, gate, up, down; None for those that drop nothing."""
    attn, mlp = layer.self_attn, layer.mlp
    linears = [*attn.qkv, attn.o_proj, *mlp.gate_up, mlp.down_proj]
    drops = [key is not None and linear.lora is not None and linear.lora.dropout > 0 for linear in linears]
    if key is None or not any(drops):
        return [None] * len(linears)
    assert context.places is not None
    share = 0 if context.tensor is None else jax.lax.axis_index(context.tensor)
    of_split_rows = (attn.o_proj, mlp.down_proj)  # of whose inputs a device of `tensor` has some columns
    draws = []
    for linear, own, drop in zip(linears, jax.random.split(key, len(linears)), drops, strict=True):
        first_column = share * inputs_of(linear) if linear in of_split_rows else 0
        draws.append(draw(own, context.places, first_column) if drop else None)
    return draws
