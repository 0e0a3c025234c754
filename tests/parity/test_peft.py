"""Against PEFT and torch: LoRA's gradients, thirty AdamW steps, adapters exchanged both ways."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from fastjax import FastLanguageModel, init_train_state, make_train_step
from fastjax.lora import lora_modules
from fastjax.train.loss import causal_lm_loss
from fastjax.train.optimizers import make_optimizer

# peft reads an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOADING = {"dtype": "float32", "load_in_4bit": False, "progress": False}


def batch_of(rows: int = 3, length: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 131, (rows, length)).astype(np.int32)
    labels = ids.copy()
    labels[0, :15] = -100  # a prompt
    labels[1, 30:] = -100  # padding
    return {"input_ids": ids, "labels": labels}


def torch_loss(model: Any, batch: dict[str, np.ndarray]) -> torch.Tensor:
    tensors = {name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()}
    return model(**tensors).loss


def random_peft(reference: Any, **options: Any) -> Any:
    """A PEFT model whose B is not zero, so that A has a gradient and the adapter an effect."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    model = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(**settings | options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.fixture
def pair(make_model: Any, tmp_path: Path) -> tuple[Any, FastLanguageModel]:
    """The same base and adapter in PEFT and here."""
    directory, reference = make_model()
    theirs = random_peft(reference)
    save_peft(theirs, tmp_path / "theirs", directory)
    ours, _ = FastLanguageModel.from_pretrained(tmp_path / "theirs", **LOADING)
    return theirs, ours


def save_peft(model: Any, directory: Path, base: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory)


def their_gradients(model: Any, projection: str) -> tuple[np.ndarray, np.ndarray]:
    """Of A [L, in, r] and B [L, r, out]."""
    stacks: tuple[list, list] = ([], [])
    for layer in model.base_model.model.model.layers:
        module = layer
        for part in projection.split("."):
            module = getattr(module, part)
        stacks[0].append(module.lora_A["default"].weight.grad.numpy().T)
        stacks[1].append(module.lora_B["default"].weight.grad.numpy().T)
    return np.stack(stacks[0]), np.stack(stacks[1])


@pytest.mark.parametrize("policy", ["none", "full"])
def test_lora_gradients(policy: Any, pair: tuple[Any, FastLanguageModel]) -> None:
    theirs, ours = pair
    batch = batch_of()
    torch_loss(theirs, batch).backward()
    definition, params, frozen = nnx.split(ours.module, nnx.Param, ...)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    runs = ((policy, ours.config.num_layers),)

    def loss(params: nnx.State) -> jax.Array:
        total, tokens = causal_lm_loss(nnx.merge(definition, params, frozen), arrays, runs=runs)
        return total / tokens

    nnx.update(ours.module, jax.jit(jax.grad(loss))(params))  # gradients, in the places of their parameters
    assert set(lora_modules(ours.module)) == {
        "self_attn." + t if "_proj" in t and t[0] in "qkvo" else "mlp." + t for t in TARGETS
    }
    for projection, lora in lora_modules(ours.module).items():
        for mine, reference in zip((lora.a, lora.b), their_gradients(theirs, projection), strict=True):
            error = np.linalg.norm(np.asarray(mine[...]) - reference) / np.linalg.norm(reference)
            assert error < 1e-4, (projection, error)


def test_thirty_adamw_steps(pair: tuple[Any, FastLanguageModel]) -> None:
    theirs, ours = pair
    trained = [p for p in theirs.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01)
    optimizer = make_optimizer("adamw", learning_rate=3e-3, weight_decay=0.01, max_grad_norm=1.0)
    state, step = init_train_state(ours, optimizer), make_train_step(ours, optimizer)
    losses: tuple[list, list] = ([], [])
    for index in range(30):
        batch = batch_of(seed=index % 3)
        loss = torch_loss(theirs, batch)
        torch_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch_optimizer.step()
        state, metrics = step(state, {name: jnp.asarray(value) for name, value in batch.items()})
        losses[0].append(loss.item())
        losses[1].append(float(metrics["loss"]))
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"use_rslora": True},
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": 1},
    "regex": {"target_modules": r".*\.(0|1)\..*(q_proj|up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "embed and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def train_a_little(model: FastLanguageModel) -> None:
    optimizer = make_optimizer("adamw", learning_rate=1e-2)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
    for _ in range(3):
        state, _ = step(state, {name: jnp.asarray(value) for name, value in batch_of().items()})
    model.load_train_state(state)


# what tying concerns is only the head
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in CASES), ("all", True), ("lm_head", True)])
def test_peft_loads_what_is_saved(name: str, tied: bool, make_model: Any, tmp_path: Path) -> None:
    directory, reference = make_model(tie_word_embeddings=tied)
    model, _ = FastLanguageModel.from_pretrained(directory, **LOADING)
    before = np.asarray(model(batch_of()["input_ids"]))
    options = {"target_modules": TARGETS} | CASES[name]
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **options)
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = np.asarray(model(batch_of()["input_ids"]))
    assert np.abs(ours - before).max() > 0.05 * np.abs(before).max()
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        theirs = loaded(torch.tensor(batch_of()["input_ids"], dtype=torch.long)).logits.numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4

    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", **LOADING)
    np.testing.assert_array_equal(np.asarray(again(batch_of()["input_ids"])), ours)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_is_loaded(name: str, make_model: Any, tmp_path: Path) -> None:
    directory, reference = make_model()
    theirs = random_peft(reference, **CASES[name])
    save_peft(theirs, tmp_path / "theirs", directory)
    ours, _ = FastLanguageModel.from_pretrained(tmp_path / "theirs", **LOADING)
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert np.abs(np.asarray(ours(ids)) - expected).max() / np.abs(expected).max() < 1e-4


def test_an_adapter_is_trained_on(make_model: Any, tmp_path: Path) -> None:
    directory, _ = make_model()
    model, _ = FastLanguageModel.from_pretrained(directory, **LOADING)
    FastLanguageModel.get_peft_model(model, r=4)
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", **LOADING)
    train_a_little(model)
    train_a_little(again)
    ids = batch_of()["input_ids"]
    np.testing.assert_array_equal(np.asarray(again(ids)), np.asarray(model(ids)))


@pytest.mark.parametrize("name", ["all", "some layers", "embed and head"])
def test_parameters_are_counted_as_peft_counts_them(name: str, make_model: Any, capsys: pytest.CaptureFixture) -> None:
    directory, reference = make_model()
    options = {"target_modules": TARGETS} | CASES[name]
    peft.get_peft_model(reference, peft.LoraConfig(r=4, **options)).print_trainable_parameters()
    for packed in (True, False):
        model, _ = FastLanguageModel.from_pretrained(directory, **LOADING | {"load_in_4bit": packed})
        FastLanguageModel.get_peft_model(model, r=4, **options).print_trainable_parameters()
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_initialisation_is_pefts(make_model: Any) -> None:
    """A uniform within 1/sqrt(in) with PEFT's spread, B zero, and the seed decides A."""
    directory, reference = make_model()
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=8, target_modules=TARGETS))
    draws = []
    for seed in (0, 0, 1):
        model, _ = FastLanguageModel.from_pretrained(directory, **LOADING)
        FastLanguageModel.get_peft_model(model, r=8, random_state=seed)
        draws.append(lora_modules(model.module))
    for projection, lora in draws[0].items():
        a = np.asarray(lora.a[...])
        assert not np.asarray(lora.b[...]).any()
        bound = a.shape[1] ** -0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        group, name = projection.split(".")
        reference_a = getattr(getattr(theirs.base_model.model.model.layers[0], group), name).lora_A["default"].weight
        assert np.std(a) == pytest.approx(reference_a.std().item(), rel=0.1)
        np.testing.assert_array_equal(a, np.asarray(draws[1][projection].a[...]))
        assert (a != np.asarray(draws[2][projection].a[...])).any()
