"""A decoder layer, forward and backward by hand: what backward keeps is chosen here, not found by autodiff.

Rows are tokens, T = B S of them, and W are linears with their LoRA:

    u = norm_1(x)        [q k v] = u W_qkv, q and k turned        o = attend(q, k, v)       m = x + o W_o
    n = norm_2(m)        [gate up] = n W_gu                       h = silu(gate) up         y = m + h W_d

Kept for the backward pass: x, q, k, v, o with its log-sum-exp, m, [gate up] and LoRA's low-rank products, which is all
that would take a large matrix product to make again. u, n and h are made again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.models.config import LlamaConfig
from fastjax.models.layers import Linear, RMSNorm, VariableType, Weights
from fastjax.models.projection import apply_linears, input_gradient, parameter_gradients, room
from pallas_kernels.flash_attention import AttentionSaved, SegmentMetadata, attention_backward, attention_forward
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_dweight, rms_norm_forward
from pallas_kernels.rope import rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a pass reads besides its parameters and its input."""

    cos: Float[Array, "B S D/2"]
    sin: Float[Array, "B S D/2"]
    segments: SegmentMetadata | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the backward pass needs of the forward pass."""

    x: Float[Array, "T H"]
    attention: AttentionSaved  # q, k, v, o, log-sum-exp
    m: Float[Array, "T H"]
    gate_up: Float[Array, "T 2M"]
    low_rank: tuple[Float[Array, "T R"] | None, ...]  # of q/k/v, o, gate/up, down


def layer_forward(
    layer: DecoderLayer, x: Float[Array, "T H"], context: Context, key: jax.Array | None
) -> tuple[Float[Array, "T H"], Saved]:
    """y, and what `layer_backward` needs. `key` turns LoRA dropout on."""
    attn, mlp, config, keys = layer.self_attn, layer.mlp, layer.config, _split_key(key)
    u = _norm(layer.input_layernorm, x, room(attn.qkv))
    qkv, z_qkv = apply_linears(attn.qkv, u, keys[:3])
    q, k, v = rope_qkv(qkv, context.cos, context.sin, config.num_heads, config.num_kv_heads)
    o, attention = attention_forward(q, k, v, causal=True, segment_ids=context.segments)
    mixed, z_o = apply_linears([attn.o_proj], _rows(o, room([attn.o_proj])), keys[3:4])
    m = x + mixed
    n = _norm(layer.post_attention_layernorm, m, room(mlp.gate_up))
    gate_up, z_gate_up = apply_linears(mlp.gate_up, n, keys[4:6])
    h = swiglu_forward(gate_up, room=room([mlp.down_proj]))
    down, z_down = apply_linears([mlp.down_proj], h, keys[6:])
    return m + down, Saved(x, attention, m, gate_up, (z_qkv, z_o, z_gate_up, z_down))


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
    attn, mlp, keys = layer.self_attn, layer.mlp, _split_key(key)
    attn_grad, mlp_grad = gradients.self_attn, gradients.mlp
    z_qkv, z_o, z_gate_up, z_down = saved.low_rank

    linears, grads = [mlp.down_proj], [mlp_grad.down_proj]
    dh, dy = input_gradient(linears, grads, z_down, dy, keys[6:])
    dgate_up, h = swiglu_backward(saved.gate_up, dh, room=room(mlp.gate_up))
    parameter_gradients(linears, grads, h, dy, keys[6:])

    linears, grads = mlp.gate_up, mlp_grad.gate_up
    dn, dgate_up = input_gradient(linears, grads, z_gate_up, dgate_up, keys[4:6])
    parameter_gradients(linears, grads, _norm(layer.post_attention_layernorm, saved.m), dgate_up, keys[4:6])
    norm, norm_grad = layer.post_attention_layernorm, gradients.post_attention_layernorm
    dm = _norm_backward(norm, norm_grad, saved.m, dn, dy, room([attn.o_proj]))

    linears, grads = [attn.o_proj], [attn_grad.o_proj]
    do, dm = input_gradient(linears, grads, z_o, dm, keys[3:4])
    parameter_gradients(linears, grads, _rows(saved.attention.out), dm, keys[3:4])

    dq, dk, dv = attention_backward(saved.attention, do.reshape(*context.cos.shape[:2], -1, layer.config.head_dim))
    dqkv = rope_qkv_backward(dq, dk, dv, context.cos, context.sin, room=room(attn.qkv))
    du, dqkv = input_gradient(attn.qkv, attn_grad.qkv, z_qkv, dqkv, keys[:3])
    parameter_gradients(attn.qkv, attn_grad.qkv, _norm(layer.input_layernorm, saved.x), dqkv, keys[:3])
    return _norm_backward(layer.input_layernorm, gradients.input_layernorm, saved.x, du, dm, carried_room(layer))


def carried_room(layer: DecoderLayer) -> int:
    """Columns that a gradient between layers has past the hidden ones."""
    return room([layer.mlp.down_proj])


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


def _split_key(key: jax.Array | None) -> list[jax.Array | None]:
    """One key a linear, in the order q, k, v, o, gate, up, down."""
    return [None] * 7 if key is None else list(jax.random.split(key, 7))
