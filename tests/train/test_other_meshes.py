"""A run goes on with another mesh than it was saved on: the same losses, each device reading its own part."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from fastjax import SFTConfig, SFTTrainer, init_train_state, make_mesh
from fastjax.errors import UserError
from fastjax.train.checkpoints import CheckpointWriter, Progress, restore_checkpoint

TEXTS = [{"text": f"{n} sheep and {n} more." * (1 + n % 3)} for n in range(13)]
ROWS = 8  # a step: of an epoch's two the second has five rows and is filled up
LEGS = [{"data": 2, "fsdp": 4}, {"fsdp": 4}, {}, {"data": 2, "fsdp": 4}]  # each goes on for two steps


def train(tiny_model, output_dir, sizes: dict[str, int], steps: int, **settings: Any) -> list[dict[str, Any]]:
    """The log so far; after the last leg the model is evaluated."""
    mesh = make_mesh(**sizes) if sizes else None
    usual: dict[str, Any] = {
        "max_steps": steps,
        "save_steps": 2,
        "per_device_train_batch_size": ROWS // math.prod(sizes.values()),
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "adamw",  # with states
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "resume_from_checkpoint": "auto",
    }
    args = SFTConfig(output_dir=str(output_dir), **usual | settings)
    held_out = TEXTS[:3] if steps == 2 * len(LEGS) else None
    trainer = SFTTrainer(model=tiny_model(mesh=mesh), train_dataset=TEXTS, eval_dataset=held_out, args=args)
    return trainer.train().log_history


def test_eight_devices_four_one_and_eight_again(tiny_model, tmp_path):
    """As one device that never stopped, over four epochs whose last batches are uneven."""
    alone = train(tiny_model, tmp_path / "alone", {}, 2 * len(LEGS))
    for leg, sizes in enumerate(LEGS, start=1):
        moved = train(tiny_model, tmp_path / "moved", sizes, 2 * leg)
    assert [record["step"] for record in moved if "loss" in record] == list(range(1, 2 * len(LEGS) + 1))
    for key in ("loss", "eval_loss", "grad_norm", "num_tokens"):
        values = [[record[key] for record in log if key in record] for log in (moved, alone)]
        np.testing.assert_allclose(*values, rtol=1e-4 if key == "grad_norm" else 1e-5)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "moved")]
    for name, values in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], values, atol=1e-4 * np.abs(values).max())
    with pytest.raises(
        UserError, match=r"data\.rows_per_step=8 and this run has 4: choose per_device_train_batch_size"
    ):
        train(tiny_model, tmp_path / "moved", {"fsdp": 4}, 10, per_device_train_batch_size=1)


def made_up(state: Any) -> Any:
    """The same arrays on the same devices with other values in them."""

    def fill(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(fill, state)


def save(state: Any, directory: Path) -> Path:
    writer = CheckpointWriter(directory, None)
    path = writer.save(state, Progress(step=1), {})
    writer.wait()
    return path


def test_shards_move_and_what_is_owed_stays(tiny_model, tmp_path):
    """Every weight trained, and split over fsdp as the optimizer's states are; no step is run."""
    optimizer = optax.adam(1e-3)

    def fresh(reduction: str, **sizes: int) -> Any:
        model = tiny_model(r=0, mesh=make_mesh(**sizes) if sizes else None)
        return init_train_state(model, optimizer, gradient_reduction=reduction)

    saved = made_up(fresh("4bit", data=2, fsdp=4))
    shapes = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(saved.opt_state)}
    assert shapes == {True, False}  # matrices are split, norms are not
    path = save(saved, tmp_path)
    meshes = [("4bit", {"data": 2, "fsdp": 4}), ("4bit", {"fsdp": 4}), ("8bit", {"data": 2, "fsdp": 4}), ("full", {})]
    for reduction, sizes in meshes:
        template = fresh(reduction, **sizes)
        state, _ = restore_checkpoint(path, template, {})
        for name in ("params", "opt_state"):
            leaves = [jax.tree.leaves(getattr(each, name)) for each in (state, saved, template)]
            for mine, old, new in zip(*leaves, strict=True):
                np.testing.assert_array_equal(mine, old)
                assert mine.sharding.is_equivalent_to(new.sharding, new.ndim)
        if reduction == "full":
            assert state.owed is None
            break
        same_mesh = sizes == meshes[0][1]
        for name in ("sent", "shared"):
            expected = np.asarray(getattr(saved.owed, name)) * same_mesh
            mine = getattr(state.owed, name)
            assert mine.sharding.shard_shape(mine.shape)[0] == 1
            assert np.array_equal(mine, expected) if same_mesh else not np.asarray(mine).any()
    # a run in full goes on with codes, owing nothing
    path = save(dataclasses.replace(saved, owed=None), tmp_path / "full")
    state, _ = restore_checkpoint(path, fresh("4bit", data=2, fsdp=4), {})
    np.testing.assert_array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(saved.params)[0])
    assert state.owed is not None
    assert not np.asarray(state.owed.sent).any()
