"""The hand-written backward pass against autodiff of the plain formulas, for every policy and every kind of layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, LlamaConfig, decoder_layer, init_weights
from fastjax.models.rope import default_positions
from fastjax.parallel.mesh import make_mesh
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    initializer_range=0.1,
    attention_bias=True,
    mlp_bias=True,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 12)), jnp.int32)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32)
RUNS = [(("none", 2),), (("full", 1), ("none", 1)), (("offload", 2),), (("offload_o", 2),)]


def make_model(
    *, packed: bool = False, trainable: bool = False, scan_layers: bool = True, lora: dict | None = None
) -> Llama:
    weights: dict[str, Any] = init_weights(CONFIG, jax.random.key(0))
    for index, name in enumerate(sorted(weights)):
        if name.endswith(("bias", "norm.weight")):
            weights[name] += 0.3 * jax.random.normal(jax.random.key(index), weights[name].shape)
        if packed and name.endswith("proj.weight"):
            weights[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(quantize_nf4, weights[name]))
    model = Llama(CONFIG, weights, dtype=jnp.float32, trainable=trainable, scan_layers=scan_layers)
    if lora is not None:
        add_lora(model, LoraConfig.create(**{"r": 4, "lora_alpha": 8} | lora))
        for index, module in enumerate(lora_modules(model).values()):
            module.b[...] = 0.3 * jax.random.normal(jax.random.key(index), module.b[...].shape)
    return model


def plain_linear(linear: Any, layer: int, x: jax.Array, mask: Any = None) -> jax.Array:
    weight = linear.weight.get_value()
    weight = dequantize_nf4(weight, jnp.float32)[layer] if isinstance(weight, NF4Array) else weight[layer]
    y = x @ weight.T + linear.bias[...][layer][None, None]
    if linear.lora is not None:
        y += linear.lora.scale[...][layer] * (x @ linear.lora.a[...][layer]) @ linear.lora.b[...][layer]
    return y


def plain_norm(norm: Any, layer: int, x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + norm.eps) * norm.weight[...][layer][None, None]


def plain_rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = CONFIG.head_dim // 2
    angles = positions[..., None].astype(jnp.float32) / CONFIG.rope.theta ** (jnp.arange(half) / half)[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def plain_hidden(model: Llama) -> jax.Array:
    """The decoder layers with no kernel, no packing and no rule of our own for any derivative; before the last norm."""
    layers, x = model.layers, model.embed_tokens.weight[...][IDS]
    positions = jnp.asarray([[*range(5), *range(7)], [*range(9), *range(3)]])
    visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & jnp.tri(12, dtype=bool)[None]
    for layer in range(CONFIG.num_layers):
        u = plain_norm(layers.input_layernorm, layer, x)
        attn = layers.self_attn
        q, k, v = (
            plain_linear(linear, layer, u).reshape(2, 12, -1, CONFIG.head_dim)
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = plain_rope(q, positions), plain_rope(k, positions)
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        logits = jnp.einsum("bqnd,bknd->bnqk", q, k) / CONFIG.head_dim**0.5
        p = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1)
        o = jnp.where((SEGMENTS > 0)[:, :, None, None], jnp.einsum("bnqk,bknd->bqnd", p, v), 0)
        x = x + plain_linear(attn.o_proj, layer, o.reshape(2, 12, -1))
        n = plain_norm(layers.post_attention_layernorm, layer, x)
        h = jax.nn.silu(plain_linear(layers.mlp.gate_proj, layer, n)) * plain_linear(layers.mlp.up_proj, layer, n)
        x = x + plain_linear(layers.mlp.down_proj, layer, h)
    return x


def value_and_gradients(model: Llama, runs: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
    definition, params, frozen = nnx.split(model, nnx.Param, ...)
    direction = jax.random.normal(jax.random.key(9), (*IDS.shape, CONFIG.hidden_size))

    @jax.jit
    def loss(params: nnx.State) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            merged = nnx.merge(definition, params, frozen)
            if runs is None:
                x = plain_hidden(merged)
                hidden = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + merged.norm.eps)
                hidden *= merged.norm.weight[...][None, None]
            else:
                hidden = merged.hidden(IDS, segment_ids=SEGMENTS, runs=runs, dropout_key=key)
            return jnp.sum(jnp.sin(hidden) * direction)

    return jax.value_and_grad(loss)(params)


def assert_close(ours: tuple, reference: tuple, tolerance: float = 1e-5) -> None:
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=tolerance, abs=5e-5)  # a sum of many signs
    leaves = jax.tree_util.tree_leaves_with_path(reference[1])
    for (path, theirs), mine in zip(leaves, jax.tree.leaves(ours[1]), strict=True):
        error = float(jnp.linalg.norm(mine - theirs) / (jnp.linalg.norm(theirs) + 1e-20))  # the head is not reached
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def lora_reference() -> tuple:
    return value_and_gradients(make_model(lora={}), None)


@pytest.mark.parametrize(
    ("scan_layers", "runs"), [(True, RUNS[0]), (True, RUNS[3]), *((False, runs) for runs in RUNS[:3])]
)
def test_lora_gradients(scan_layers: bool, runs: Any, lora_reference: tuple) -> None:
    assert_close(value_and_gradients(make_model(lora={}, scan_layers=scan_layers), runs), lora_reference)


@pytest.mark.parametrize("options", [{"lora": {}}, {"trainable": True}], ids=str)
def test_a_layer_in_parts(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens, 8 at a time through the second half, both ways."""
    monkeypatch.setattr(decoder_layer, "PART", 8)
    monkeypatch.setattr(decoder_layer, "TILE", 4)
    assert decoder_layer.parts_of(IDS.size) == 3
    model = make_model(**options)
    assert_close(value_and_gradients(model, (("full", 1), ("none", 1))), value_and_gradients(model, None))


def test_parts_drop_what_the_whole_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, key = make_model(lora={"lora_dropout": 0.5}), jax.random.key(3)
    whole = value_and_gradients(model, (("none", 2),), key)
    monkeypatch.setattr(decoder_layer, "PART", 8)
    monkeypatch.setattr(decoder_layer, "TILE", 4)
    assert_close(value_and_gradients(model, (("full", 2),), key), whole)


def test_parts_are_equal_and_whole_tiles() -> None:
    tokens = (1, 8192, 8193, 16384, 12288, 65536, 3 * 8192, 10000, 128 * 97)
    assert [decoder_layer.parts_of(count) for count in tokens] == [1, 1, 1, 2, 2, 8, 3, 1, 1]


def test_only_layers_that_keep_all_are_in_line() -> None:
    """On a GPU, XLA drops a copy to the host that the same program copies back, unless it goes through a loop's stack."""
    definition, params, frozen = nnx.split(make_model(lora={}, scan_layers=False), nnx.Param, ...)

    def loops(policy: str) -> int:
        def loss(params: nnx.State) -> jax.Array:
            return nnx.merge(definition, params, frozen).hidden(IDS, runs=((policy, 2),)).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(params))
        return program.count("scan[") + program.count("while[")

    assert (loops("none"), loops("full"), loops("offload")) == (0, 2, 2)


def test_gathered_weights_are_not_kept_for_the_backward_pass() -> None:
    """Each layer in line gathers in both passes: a compiler that does so once has all layers' weights in memory."""
    definition, params, frozen = nnx.split(make_model(lora={}, scan_layers=False), nnx.Param, ...)

    class GatesAlone:
        def __call__(self, layer: nnx.State) -> nnx.State:
            gate = layer["mlp"]["gate_proj"]["weight"]
            gate.set_value(jax.lax.all_gather(gate[...], "fsdp", tiled=True)[: gate.shape[0]])
            return layer

        def scatter(self, gradients: nnx.State) -> nnx.State:
            return gradients

    def loss(params: nnx.State, frozen: nnx.State) -> jax.Array:
        return nnx.merge(definition, params, frozen).hidden(IDS, gather=GatesAlone()).sum()

    whole = PartitionSpec()
    mesh = make_mesh(fsdp=2)
    gradients = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(whole, whole), out_specs=whole, check_vma=False)
    program = jax.jit(gradients).lower(params, frozen).compile().as_text()
    assert program.count(" all-gather(") == 2 * CONFIG.num_layers


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"target_modules": ["o_proj"], "layers_to_transform": [1]}, "packed": True},
        # one linear of a packed product, and a gradient past the first layer
        {"lora": {"target_modules": ["k_proj", "up_proj"], "modules_to_save": ["embed_tokens"]}},
        {"trainable": True},  # every weight, bias and norm
    ],
    ids=str,
)
def test_what_is_trained(options: dict) -> None:
    model = make_model(**options)
    assert_close(value_and_gradients(model, (("full", 1), ("none", 1))), value_and_gradients(model, None))


def test_positions_of_whole_rows_leave_nothing_to_be_folded() -> None:
    """XLA would make the maximum over constants itself, in S^2 steps."""
    whole = jax.make_jaxpr(lambda: default_positions((2, 9), None))()
    assert "cummax" not in str(whole)
    assert (default_positions((2, 9), None) == default_positions((2, 9), jnp.ones((2, 9), jnp.int32))).all()
