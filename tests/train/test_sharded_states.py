"""Under fsdp no device has more than its part of weights and states, and the steps are those of one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastjax import FastLanguageModel, TrainState, init_train_state, make_mesh, make_train_step
from fastjax.lora import lora_modules
from fastjax.models import Llama, LlamaConfig, RopeConfig
from fastjax.parallel.traffic import sent_bytes
from fastjax.train.blockwise_8bit import BLOCK_SIZE
from fastjax.train.memory import step_memory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from tests.train.drawn import drawn_weights

CONFIG = LlamaConfig(
    vocab_size=104,
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    initializer_range=0.1,
    rope=RopeConfig(kind="dynamic", factor=2.0, original_max_position=8),  # follows the longest row of the batch
)
DEVICES = 8


def drawn_model(mesh: jax.sharding.Mesh | None) -> FastLanguageModel:
    """Packed, with LoRA of which q's is wide enough for moments in 8 bits, and B drawn so that every gradient is alive."""
    module = Llama(CONFIG, drawn_weights(CONFIG, mesh), dtype=jnp.float32)
    lora = {"r": 16, "target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"]}
    model = FastLanguageModel.get_peft_model(FastLanguageModel(module, mesh=mesh), **lora)
    for index, factors in enumerate(lora_modules(module).values()):
        b = factors.b[...]
        factors.b[...] = jax.device_put(0.1 * jax.random.normal(jax.random.key(index), b.shape), b.sharding)
    return model


def drawn_batch() -> dict[str, jax.Array]:
    """Rows of unequal lengths."""
    generator = np.random.default_rng(0)
    real = (np.arange(16) < generator.integers(6, 17, (8, 1))).astype(np.int32)
    ids = real * generator.integers(1, CONFIG.vocab_size, real.shape, np.int32)
    batch = {"input_ids": ids, "labels": np.where(real, ids, -100).astype(np.int32), "segment_ids": real}
    return jax.tree.map(jnp.asarray, batch)


def five_steps(mesh: jax.sharding.Mesh | None) -> tuple[FastLanguageModel, TrainState, list[list[float]], float]:
    """The model and the state after them; losses and norms; bytes that a device sends in one."""
    model, optimizer = drawn_model(mesh), make_optimizer("adamw_8bit", 1e-2, weight_decay=0.1)
    step: Any = make_train_step(model, optimizer, mesh, gradient_checkpointing="full")
    state, batch, measured = init_train_state(model, optimizer), drawn_batch(), []
    sent = sent_bytes(step.trace(state, batch).jaxpr)
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    for _ in range(5):
        state, metrics = step(state, batch)
        measured.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    for leaf, sharding in zip(jax.tree.leaves(state), before, strict=True):  # or a step would be compiled twice
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return model, state, measured, sent


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def bytes_split(state: Any, of_layers: bool) -> int:
    """Of what lies in parts, in the layers or outside."""
    leaves = jax.tree.leaves([value for name, value in state.items() if (name == "layers") is of_layers])
    return sum(leaf.nbytes for leaf in leaves if not leaf.sharding.is_fully_replicated)


def test_a_device_has_its_part_and_steps_are_those_of_one() -> None:
    """With moments in 8 bits, and of small matrices in 32; other_meshes and context have AdamW with all in 32."""
    model, state, measured, sent = five_steps(make_mesh(fsdp=DEVICES))
    _, _, alone, _ = five_steps(None)
    np.testing.assert_allclose(measured[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(measured, alone, rtol=1e-3)
    assert alone[-1][0] < alone[0][0] - 0.1

    # of layers what is packed is gathered as it is in either pass, what is trained too, and its gradients scattered
    of_layers, outside = (bytes_split(nnx.state(model.module, nnx.Not(nnx.Param)), only) for only in (True, False))
    trained, head = (bytes_split(state.params, only) for only in (True, False))
    received = 2 * of_layers + outside + 3 * trained + 2 * head
    assert 0 <= sent - received * (DEVICES - 1) / DEVICES < 64  # and a few sums of numbers

    held = jax.tree.leaves((nnx.state(model.module), state.params, state.opt_state))
    whole = [leaf for leaf in held if leaf.sharding.is_fully_replicated]
    assert all(leaf.size <= CONFIG.num_layers * CONFIG.hidden_size for leaf in whole)  # norms, scales and counts
    split = sum(leaf.nbytes for leaf in held) - bytes_on_a_device(whole)
    assert bytes_on_a_device(held) == split / DEVICES + bytes_on_a_device(whole)
    layout = MeshLayout.planned(model.module, {"fsdp": DEVICES})
    memory = step_memory(model.module, state.opt_state, 32, layout=layout)
    assert memory.static - memory.gradients == bytes_on_a_device(held)  # as `fastjax plan` counts it
    states: Any = state.opt_state
    attention = states[1].m["layers"]["self_attn"]
    moment = attention["q_proj"]["lora"]["a"].get_value()
    blocks = moment.codes.size // DEVICES / BLOCK_SIZE  # a device has the scales of its codes
    assert moment.absmax.addressable_shards[0].data.size == blocks
    small = attention["k_proj"]["lora"]["b"].get_value()
    assert small.dtype == jnp.float32
    assert small.addressable_shards[0].data.size == small.size // DEVICES
