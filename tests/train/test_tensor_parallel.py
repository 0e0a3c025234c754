"""Devices that share rows (`data`), weights (`fsdp`) or the work on each layer (`tensor`) make the updates that one makes.

For `context` see test_context.py; for moments in 8 bits, and what a device holds, test_sharded_states.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastjax import init_train_state, make_mesh, make_train_step
from fastjax.errors import UserError
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, LlamaConfig
from fastjax.parallel.hosts import onto_mesh
from fastjax.train.loss import causal_lm_loss
from fastjax.train.optimizers import make_optimizer
from fastjax.train.tensor_parallel import check_tensor_size
from tests.train.drawn import drawn_weights

CONFIG = LlamaConfig(
    vocab_size=104,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    initializer_range=0.1,
    attention_bias=True,
    mlp_bias=True,
)


def drawn_model(mesh: Mesh | None = None) -> Llama:
    """LoRA on all linears, and some parameters of every other kind trained too. All values are such that gradients live."""
    model = Llama(CONFIG, drawn_weights(CONFIG, mesh, dense="o_proj"), dtype=jnp.float32)
    add_lora(model, LoraConfig.create(r=4, lora_alpha=8, modules_to_save=["embed_tokens"]))
    for index, lora in enumerate(lora_modules(model).values()):
        lora.b[...] = 0.1 * jax.random.normal(jax.random.key(index), lora.b[...].shape)
    attention, mlp = model.layers.self_attn, model.layers.mlp
    for linear in (attention.k_proj, attention.o_proj):  # q/k/v and o with dropout, the MLP without
        linear.lora.dropout = 0.5
    for linear in (attention.q_proj, attention.o_proj, mlp.down_proj):
        assert linear.bias is not None
        linear.bias = nnx.Param(linear.bias[...])
    for module in (attention.o_proj, model.layers.input_layernorm, model.norm):
        module.weight = nnx.Param(module.weight[...])
    nnx.update(model, onto_mesh(nnx.state(model), mesh))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Two micro-batches of eight rows, each of two packed documents and padding; some tokens are not to be learnt."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, CONFIG.vocab_size, (2, 8, 30)).astype(np.int32)
    ends = np.sort(rng.integers(3, 31, (2, 8, 2, 1)), axis=2)
    place = np.arange(30)
    segment_ids = np.where(place < ends[..., 0, :], 1, np.where(place < ends[..., 1, :], 2, 0)).astype(np.int32)
    labels = np.where((segment_ids > 0) & (rng.random(ids.shape) < 0.8), ids, -100).astype(np.int32)
    return jax.tree.map(jnp.asarray, {"input_ids": ids, "labels": labels, "segment_ids": segment_ids})


def train(model: Llama, batch: dict, mesh: Mesh | None = None, **options: Any) -> tuple[list[float], Any]:
    """The losses of five AdamW steps, and the first one's gradients, of which the first moment is a tenth."""
    options |= {"neftune_noise_alpha": 5.0}  # drawn by place, like dropout: the same on every mesh
    optimizer = make_optimizer("adamw", 1e-2, max_grad_norm=None)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer, mesh, **options)
    losses, first = [], None
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if first is None:
            adam: Any = state.opt_state
            first = jax.tree.map(lambda moment: 10 * np.array(moment), adam[0].m)
    return losses, first


def assert_same(ours: tuple, reference: tuple) -> None:
    assert ours[0][0] == pytest.approx(reference[0][0], rel=1e-5)
    np.testing.assert_allclose(ours[0], reference[0], rtol=1e-4)
    assert reference[0][-1] < reference[0][0] - 0.1  # or there was nothing to compare

    def same(path: Any, mine: np.ndarray, theirs: np.ndarray) -> None:
        error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(same, ours[1], reference[1])


@pytest.fixture(scope="module")
def alone(batch: dict) -> tuple:
    return train(drawn_model(), batch)


@pytest.mark.parametrize(
    ("sizes", "policy"),
    [
        ({"data": 8}, "none"),
        ({"fsdp": 8}, "offload"),
        ({"tensor": 4}, "none"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "full"),
    ],
    ids=str,
)
def test_steps_are_those_of_one_device(sizes: dict, policy: str, batch: dict, alone: tuple) -> None:
    mesh = make_mesh(**sizes)
    model = drawn_model(mesh)
    for linear in (model.layers.self_attn.k_proj, model.layers.mlp.down_proj):
        packed = linear.weight.get_value()
        copies = mesh.shape["data"] * mesh.shape["context"]
        assert packed.codes.addressable_shards[0].data.nbytes == packed.codes.nbytes // mesh.size * copies
    assert_same(train(model, batch, mesh, gradient_checkpointing=policy), alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_kv_heads": 2},
            r"tensor=4 does not divide the model's num_key_value_heads = 2; sizes that fit it are 1, 2\.",
        ),
        ({"num_heads": 6, "num_kv_heads": 6}, r"num_attention_heads = 6; sizes that fit it are 1\."),  # 96 = 1.5 blocks
        ({"intermediate_size": 384}, r"intermediate_size in blocks of 64 = 6; sizes that fit it are 1, 2\."),
        ({"vocab_size": 102}, r"vocab_size = 102; sizes that fit it are 1, 2\."),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tensor_size(dataclasses.replace(CONFIG, **change), 4, packed=True)


def test_a_model_that_is_not_split_and_a_loss_that_sees_weights_are_refused() -> None:
    mesh = make_mesh(tensor=4)
    model = Llama(CONFIG, drawn_weights(CONFIG, mesh, dense="layers"), dtype=jnp.float32)
    with pytest.raises(UserError, match="of which mesh axis tensor leaves parts"):
        make_train_step(model, optax.identity(), mesh, loss_fn=causal_lm_loss)
    whole = jax.device_put(model.embed_tokens.weight[...], NamedSharding(mesh, PartitionSpec()))
    model.embed_tokens.weight = nnx.Variable(whole)
    with pytest.raises(UserError, match=r"embed_tokens.weight is not split over mesh axis tensor as a step needs it"):
        make_train_step(model, optax.identity(), mesh)
