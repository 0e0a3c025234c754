"""Rows divided over devices: packed, accumulated steps give the losses and gradients of a single device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from fastjax import init_train_state, make_mesh, make_train_step
from fastjax.errors import UserError
from fastjax.lora import lora_modules
from fastjax.parallel.hosts import place_batch
from fastjax.train.optimizers import make_optimizer
from fastjax.train.step import make_mesh_loss

MICRO_BATCHES, ROWS, LENGTH = 2, 2, 100  # filled up to 128: 8 chunks of 16


@pytest.fixture(scope="module")
def packed() -> dict[str, np.ndarray]:
    """Documents of random lengths, of which chunks cut some in two and most hold several; padding at the end."""
    rng = np.random.default_rng(0)
    shape = (MICRO_BATCHES, ROWS, LENGTH)
    ids = rng.integers(2, 256, shape).astype(np.int32)
    segments = 1 + np.cumsum(rng.random(shape) < 0.08, axis=-1, dtype=np.int32)
    segments[..., LENGTH - 9 :] = 0
    labels = np.where((segments > 0) & (rng.random(shape) < 0.8), ids, -100).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def drawn(make: Any, mesh: Mesh | None) -> Any:
    """With B of LoRA alive, so that A's gradients are."""
    model = make(mesh=mesh)
    for index, lora in enumerate(lora_modules(model.module).values()):
        lora.b[...] = 0.1 * jax.random.normal(jax.random.key(index), lora.b[...].shape)
    return model


def five_steps(make: Any, batch: dict[str, np.ndarray], mesh: Mesh | None, checkpointing: str) -> tuple:
    """Losses, tokens, and the gradients of the first step, as AdamW's first moments have them."""
    model = drawn(make, mesh)
    optimizer = make_optimizer("adamw", 1e-2, weight_decay=0.1, max_grad_norm=None)
    state, losses, gradients = init_train_state(model, optimizer), [], None
    step = make_train_step(model, optimizer, mesh, gradient_checkpointing=checkpointing)
    placed = place_batch(batch, mesh, ROWS) if mesh else jax.tree.map(jnp.asarray, batch)
    for _ in range(5):
        state, metrics = step(state, placed)
        gradients = gradients or [np.array(g) for g in jax.tree.leaves(state.opt_state[0].m)]
        losses.append(float(metrics["loss"]))
    return losses, float(metrics["tokens"]), gradients


@pytest.fixture(scope="module")
def alone(tiny_model: Any, packed: dict) -> tuple:
    return five_steps(tiny_model, packed, None, "none")


@pytest.mark.parametrize(("sizes", "policy"), [({"context": 4}, "offload"), ({"fsdp": 2, "context": 4}, "none")])
def test_rows_over_devices_change_nothing(
    tiny_model: Any, packed: dict, alone: tuple, sizes: dict, policy: str
) -> None:
    losses, tokens, gradients = five_steps(tiny_model, packed, make_mesh(**sizes), policy)
    expected, all_tokens, expected_gradients = alone
    assert tokens == all_tokens
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert expected[4] < expected[0] - 0.05
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_evaluation_on_a_mesh(tiny_model: Any, packed: dict, alone: tuple) -> None:
    """Each device evaluates its part of the rows, of each row, of the weights."""
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    model = drawn(tiny_model, mesh)
    rows = {name: array.reshape(-1, LENGTH) for name, array in packed.items()}
    params = nnx.state(model.module, nnx.Param)
    loss_sum, tokens = make_mesh_loss(model, mesh)(params, place_batch(rows, mesh, MICRO_BATCHES * ROWS))
    assert float(tokens) == alone[1]
    assert float(loss_sum / tokens) == pytest.approx(alone[0][0], rel=1e-5)


def test_a_loss_of_whole_rows_is_refused(tiny_model: Any) -> None:
    mesh = make_mesh(context=2)
    with pytest.raises(UserError, match="of which mesh axis context leaves parts"):
        make_train_step(tiny_model(mesh=mesh), optax.sgd(1.0), mesh, loss_fn=lambda module, batch: (0, 0))
