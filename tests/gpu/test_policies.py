"""On a GPU: what is offloaded comes back as it went, in time, and is in host memory in between."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.workloads import SHAPES, random_packed_model
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.train.memory import sent_bytes

pytestmark = pytest.mark.gpu
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 512)), jnp.int32)


@pytest.fixture(scope="module")
def model() -> Any:
    packed = random_packed_model(dataclasses.replace(SHAPES["tiny"], num_layers=4), scan_layers=False)
    add_lora(packed, LoraConfig.create(r=16, lora_alpha=16))
    for index, module in enumerate(lora_modules(packed).values()):
        module.b[...] = 0.1 * jax.random.normal(jax.random.key(index), module.b[...].shape)
    return packed


def compiled_gradients(model: Any, policy: str) -> tuple[Any, Any]:
    definition, params, frozen = nnx.split(model, nnx.Param, ...)
    runs = ((policy, model.config.num_layers),)
    direction = jax.random.normal(jax.random.key(9), (*IDS.shape, model.config.hidden_size))

    def loss(params: nnx.State, frozen: nnx.State) -> jax.Array:
        hidden = nnx.merge(definition, params, frozen).hidden(IDS, runs=runs)
        return jnp.sum(hidden.astype(jnp.float32) * direction)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, frozen).compile()
    return compiled, compiled(params, frozen)


@pytest.mark.parametrize("policy", ["offload", "offload_o"])
def test_offloaded_layers_are_as_those_run_again(model: Any, policy: str) -> None:
    _, (loss, gradients) = compiled_gradients(model, "full")
    compiled, (own_loss, own) = compiled_gradients(model, policy)
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-3)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(gradients), strict=True):
        error = float(jnp.linalg.norm(mine - theirs) / (jnp.linalg.norm(theirs) + 1e-20))
        assert error < 1e-2, (jax.tree_util.keystr(path), error)
    sent = model.config.num_layers * sent_bytes(model.config, model.dtype.itemsize, IDS.size, policy)  # pyright: ignore
    assert compiled.memory_analysis().host_temp_size_in_bytes >= sent
