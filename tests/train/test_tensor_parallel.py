"""The `tensor` axis: devices that share the work on each layer make the update that one device makes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from fastjax import init_train_state, make_mesh, make_train_step
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, LlamaConfig, init_weights, param_specs
from fastjax.parallel.hosts import onto_mesh
from fastjax.weights.placement import make_target, pack, shardings_of

CONFIG = LlamaConfig(
    vocab_size=104,
    hidden_size=64,
    intermediate_size=512,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    initializer_range=0.1,
    attention_bias=True,
    mlp_bias=True,
)


def lora_model(mesh: Mesh | None = None, config: LlamaConfig = CONFIG, **options: Any) -> Llama:
    """Packed as a loader packs it, each share where it belongs; biases and LoRA's B are drawn, so that every gradient lives."""
    weights: dict[str, Any] = init_weights(config, jax.random.key(0))
    for index, (name, spec) in enumerate(param_specs(config).items()):
        target = make_target(spec, quantize=spec.quantize, dtype=jnp.float32, mesh=mesh)
        value = weights[name]
        if spec.init == "zeros":
            value = 0.1 * jax.random.normal(jax.random.key(index), value.shape)
        if spec.quantize:
            layers = [pack(target, layer) for layer in value]
            value = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        weights[name] = value if mesh is None else jax.device_put(value, shardings_of(target, value))
    model = Llama(config, weights, dtype=jnp.float32)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8} | options
    add_lora(model, LoraConfig.create(**settings))
    for index, lora in enumerate(lora_modules(model).values()):
        lora.b[...] = 0.1 * jax.random.normal(jax.random.key(index), lora.b[...].shape)
    nnx.update(model, onto_mesh(nnx.state(model), mesh))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Two micro-batches of four rows, each of two packed documents and padding; some tokens are not to be learnt."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, CONFIG.vocab_size, (2, 4, 24)).astype(np.int32)
    ends = np.sort(rng.integers(6, 25, (2, 4, 2, 1)), axis=2)
    place = np.arange(24)
    segment_ids = np.where(place < ends[..., 0, :], 1, np.where(place < ends[..., 1, :], 2, 0)).astype(np.int32)
    labels = np.where((segment_ids > 0) & (rng.random(ids.shape) < 0.8), ids, -100).astype(np.int32)
    return jax.tree.map(jnp.asarray, {"input_ids": ids, "labels": labels, "segment_ids": segment_ids})


def gradients(model: Llama, batch: dict, mesh: Mesh | None = None, **options: Any) -> tuple[dict, Any]:
    """Metrics and gradients of a step, read off an update with plain SGD at rate 1."""
    state = init_train_state(model, optax.sgd(1.0))
    before = jax.tree.map(np.array, state.params)
    state, metrics = make_train_step(model, optax.sgd(1.0), mesh, **options)(state, batch)
    return jax.device_get(metrics), jax.tree.map(lambda old, new: old - np.array(new), before, state.params)


def assert_same(ours: tuple, reference: tuple) -> None:
    assert ours[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)
    assert ours[0]["tokens"] == reference[0]["tokens"]

    def same(path: Any, mine: np.ndarray, theirs: np.ndarray) -> None:
        # read off an update, gradients carry the rounding of the parameters they were taken from
        error = np.linalg.norm(mine - theirs)
        assert error <= 1e-5 * np.linalg.norm(theirs) + 1e-7 * mine.size**0.5, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(same, ours[1], reference[1])


@pytest.fixture(scope="module")
def alone(batch: dict) -> tuple:
    return gradients(lora_model(), batch)


@pytest.mark.parametrize(
    ("sizes", "policy"), [({"tensor": 4}, "none"), ({"data": 2, "fsdp": 2, "tensor": 2}, "full")], ids=str
)
def test_one_step_is_that_of_one_device(sizes: dict, policy: str, batch: dict, alone: tuple) -> None:
    mesh = make_mesh(**sizes)
    model = lora_model(mesh)
    for linear in (model.layers.self_attn.k_proj, model.layers.mlp.down_proj):
        packed = linear.weight.get_value()
        assert packed.codes.addressable_shards[0].data.nbytes == packed.codes.nbytes // mesh.size * mesh.shape["data"]
    assert_same(gradients(model, batch, mesh, gradient_checkpointing=policy), alone)
