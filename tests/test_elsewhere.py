"""What scripts for other libraries say: taken where it asks for what happens here, else answered with what to say."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import IntervalStrategy, SchedulerType, TrainingArguments

import fastjax
from fastjax import FastLanguageModel, SFTConfig, SFTTrainer, elsewhere
from fastjax.errors import UserError
from fastjax.generate import complete, make_request
from fastjax.models import Llama, LlamaConfig, init_weights

TABLES = {
    "FROM_PRETRAINED": FastLanguageModel.from_pretrained,
    "GET_PEFT_MODEL": FastLanguageModel.get_peft_model,
    "SFT_CONFIG": SFTConfig,
    "SFT_TRAINER": SFTTrainer,
    "SAVE": FastLanguageModel.save_pretrained_merged,
    "GENERATE": complete,
}


Model: Any = FastLanguageModel  # names that no checker of types knows
Config: Any = SFTConfig
Trainer: Any = SFTTrainer


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
    )
    return FastLanguageModel(Llama(config, init_weights(config, jax.random.key(0)), dtype=jnp.float32))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_answers_for_what_its_function_lacks(name: str) -> None:
    """And what it says a thing is called is what the function calls it."""
    table, names = getattr(elsewhere, name), set(inspect.signature(TABLES[name]).parameters)
    names |= set(inspect.signature(make_request).parameters) if name == "GENERATE" else set()
    assert not names & set(table)
    words = [instead.words.split() for instead in table.values() if instead is not None]
    assert {each[3] for each in words if each[:3] == ["it", "is", "called"]} <= names
    assert all(
        instead.words in {*elsewhere.CONFIG_DATA.values(), instead.words} for instead in table.values() if instead
    )


def test_what_asks_for_nothing_else_is_taken() -> None:
    """The settings that notebooks for Unsloth have, and every default of transformers' own that is answered for."""
    defaults = {
        field: TrainingArguments.__dataclass_fields__[field].default
        for field in elsewhere.SFT_CONFIG.keys() & TrainingArguments.__dataclass_fields__.keys()
    }
    given: dict[str, Any] = {
        "bf16": True,
        "fp16": False,
        "eval_strategy": IntervalStrategy.STEPS,
        "save_strategy": "no",
        "lr_scheduler_type": SchedulerType.COSINE_WITH_RESTARTS,
        "report_to": None,
        "dataset_num_proc": 2,
        "group_by_length": False,
        "warmup_steps": np.int64(5),
        "learning_rate": np.float32(0.5),
    }
    config = Config("out", **defaults, **given)
    assert (config.output_dir, config.eval_strategy, config.warmup_steps) == ("out", "steps", 5)
    assert config.lr_scheduler_type == "cosine_with_restarts"
    model = Model.get_peft_model(make_model(), r=2, loftq_config=None, use_gradient_checkpointing="unsloth")
    assert model.lora is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Config(lr=1e-4), r"SFTConfig takes no lr: it is called learning_rate here\."),
        (lambda: Config(learning_rat=1e-4), "Unknown key 'learning_rat' in SFTConfig: did you mean 'learning_rate'"),
        (lambda: Config(group_by_length=True), "takes no group_by_length=True: packing=True leaves no padding"),
        (lambda: Config(save_strategy="best"), "save_strategy='best' .* one of 'no', 'steps', 'epoch'"),
        (lambda: Config(eval_strategy="no", eval_prompts=["a"]), "eval_strategy='no' has none"),
        (lambda: Model.from_pretrained("x", load_in_8bit=True), "takes no load_in_8bit=True: .* in 4 bits"),
        (lambda: Model.from_pretrained("x", device_map={"": 0}), "make_mesh"),
        (lambda: Model.get_peft_model(make_model(), use_dora=True), "plain or rank-stabilised"),
        (
            lambda: Model.get_peft_model(make_model(), use_gradient_checkpointing="x"),
            "'x' is unknown; use one",
        ),
        (lambda: Model.get_peft_model(make_model(), r=SFTConfig()), r"get_peft_model\(model, r=16"),
        (lambda: Trainer("x", train_dataset=[]), r"takes a model and no name: .*from_pretrained\('x'\)"),
        (lambda: Trainer(make_model(), train_dataset=[], max_seq_length=9), "a setting of SFTConfig"),
        (lambda: Trainer(make_model(), train_dataset=[], peft_config=3), "get_peft_model"),
        (
            lambda: Trainer(make_model(), train_dataset=[], args={}),
            r"takes args=SFTConfig\(...\) of fastjax, not a dict",
        ),
        (
            lambda: Trainer(make_model(), train_dataset=[], args=Config(bf16=True)),
            "bf16=True .* computes in float32",
        ),
        (lambda: make_model().save_pretrained("x", push_to_hub=True), "huggingface_hub"),
        (lambda: make_model().save_pretrained_merged("x", None, save_method="lora"), "save_pretrained for the adapter"),
    ],
)
def test_what_asks_for_something_else_is_answered(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_attributes_of_elsewhere_are_answered() -> None:
    model = make_model()
    with pytest.raises(AttributeError, match="FastLanguageModel has no save_pretrained_gguf: GGUF is not written"):
        model.save_pretrained_gguf("x")
    with pytest.raises(AttributeError, match=r"FastLanguageModel has no wings\.$"):
        _ = model.wings
    with pytest.raises(AttributeError, match=r"SFTTrainer has no save_model: write model\.save_pretrained"):
        Trainer.__new__(SFTTrainer).save_model("x")
    with pytest.raises(ImportError, match="it is called SFTConfig here"):
        from fastjax import TrainingArguments  # noqa: F401  # pyright: ignore
    assert not hasattr(fastjax, "wings")
    assert not hasattr(model, "wings")
