"""On two GPUs that share each layer's work, each row or the weights: the steps of one GPU, with the kernels that run there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from bench.workloads import SHAPES, random_packed_model
from fastjax import FastLanguageModel, init_train_state, make_mesh, make_train_step
from fastjax.parallel.hosts import place_batch
from fastjax.train.optimizers import make_optimizer

pytestmark = pytest.mark.gpu


def losses(mesh: Mesh | None, policy: str) -> list[float]:
    """Of five steps of a tiny Llama on random tokens, two documents a row."""
    module = random_packed_model(SHAPES["tiny"], mesh=mesh)
    model = FastLanguageModel.get_peft_model(FastLanguageModel(module, mesh=mesh), r=8, lora_alpha=16, lora_dropout=0.1)
    optimizer = make_optimizer("adamw", learning_rate=1e-2)
    state = init_train_state(model, optimizer)
    step = make_train_step(model, optimizer, mesh, gradient_checkpointing=policy)
    ids = np.random.default_rng(0).integers(3, SHAPES["tiny"].vocab_size, (4, 256)).astype(np.int32)
    segments = np.broadcast_to(1 + (np.arange(256) > 150), ids.shape).astype(np.int32)
    batch = place_batch({"input_ids": ids, "labels": ids, "segment_ids": segments}, mesh, len(ids))
    found = []
    for _ in range(5):
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        found.append(float(metrics["loss"]))
    return found


@functools.cache
def losses_alone() -> list[float]:
    return losses(None, "none")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("axis", "policy"), [("tensor", "full"), ("context", "none"), ("fsdp", "none")])
def test_two_gpus_do_what_one_does(axis: str, policy: str) -> None:
    """Each compiled but once: what is kept of a layer changes no sum."""
    alone = losses_alone()
    assert alone[-1] < alone[0] - 0.05
    np.testing.assert_allclose(losses(make_mesh(**{axis: 2}), policy), alone, rtol=3e-3)
