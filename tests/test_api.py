"""FastLanguageModel on a mesh: loaded in shards, adapted, trained and saved as on one device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastjax import FastLanguageModel, init_train_state, make_mesh, make_train_step
from fastjax.errors import UserError
from fastjax.models import LlamaConfig, init_weights
from fastjax.models.llama import Llama
from fastjax.train.optimizers import make_optimizer
from fastjax.weights.merge import save_model

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "base"
    model = Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32)
    save_model(directory, model, hf_config={})
    return directory


def train(checkpoint: Path, mesh: jax.sharding.Mesh | None) -> tuple[list[float], np.ndarray]:
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, dtype="float32", mesh=mesh, progress=False)
    assert tokenizer is None
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, modules_to_save=["lm_head"])
    optimizer = make_optimizer("adamw", learning_rate=1e-2)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer, mesh=mesh)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 96, (4, 16)), jnp.int32)
    losses = []
    for _ in range(3):
        state, metrics = step(state, {"input_ids": ids, "labels": ids})
        losses.append(float(metrics["loss"]))
    model.load_train_state(state)
    return losses, np.asarray(model(ids))


@pytest.fixture(scope="module")
def on_one_device(checkpoint: Path) -> tuple[list[float], np.ndarray]:
    return train(checkpoint, None)


def test_training_on_a_mesh(checkpoint: Path, on_one_device: tuple) -> None:
    losses, logits = train(checkpoint, make_mesh(data=2, fsdp=2))
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-4)
    assert losses[-1] < losses[0]
    error = np.linalg.norm(logits - on_one_device[1]) / np.linalg.norm(on_one_device[1])
    assert error < 1e-3  # Adam divides by the root of tiny moments, which magnifies the order of summation


def test_a_mesh_made_by_jax_will_do(checkpoint: Path) -> None:
    mesh = jax.make_mesh((2,), ("data",))
    model, _ = FastLanguageModel.from_pretrained(checkpoint, dtype="float32", mesh=mesh, progress=False)
    FastLanguageModel.get_peft_model(model, r=4)
    make_train_step(model, make_optimizer("sgd"), mesh=mesh)
    with pytest.raises(UserError, match="batch"):
        make_train_step(model, make_optimizer("sgd"), mesh=jax.make_mesh((2,), ("batch",)))


def test_a_model_that_is_not_on_the_mesh_is_refused(checkpoint: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(checkpoint, dtype="float32", progress=False)
    FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(UserError, match="mesh=mesh"):
        make_train_step(model, make_optimizer("sgd"), mesh=make_mesh(data=2))


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="needs 64 devices"):
        make_mesh(data=64)
