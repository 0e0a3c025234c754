"""SFTConfig: the names are TRL's, wrong values and wrong names say what is right."""

import dataclasses
from pathlib import Path

import pytest

from fastjax.errors import UserError
from fastjax.train.config import SFTConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": 0}, r"learning_rate=0 is not valid: it must be a number above 0\."),
        ({"learning_rate": "2e-4"}, "learning_rate='2e-4' is not valid"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 .* a whole number of at least 1"),
        ({"per_device_train_batch_size": 2.0}, r"per_device_train_batch_size=2\.0"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True"),
        ({"max_steps": 0}, "max_steps=0 is not valid: it must be -1 or above 0"),
        ({"num_train_epochs": -1}, "num_train_epochs=-1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5 .* of at least 0 and below 1"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"max_length": 1}, "max_length=1 .* a whole number of at least 2, or None"),
        ({"packing": "yes"}, "packing='yes' is not valid: it must be one of True, False"),
        ({"packing": 1}, "packing=1"),
        ({"optim": "adam"}, "optim='adam' is not valid: it must be one of 'adamw', 'adamw_8bit', 'lion'"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type='step' .* 'linear', 'cosine'"),
        ({"report_to": "mlflow"}, "report_to='mlflow' .* one of 'none', 'tensorboard', 'wandb', or a list of them"),
        ({"eval_prompts": "one"}, "eval_prompts='one' is not valid: it must be a list of non-empty strings"),
        ({"overlong": "cut"}, "overlong='cut' .* 'truncate', 'split', 'drop', 'error'"),
        ({"output_dir": ""}, "output_dir='' is not valid: it must be a non-empty string"),
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing='some' .* 'auto'"),
        ({"max_length": 8, "max_seq_length": 16}, "max_length=8 and .*max_seq_length=16 name the same setting"),
    ],
)
def test_wrong_values_name_field_value_and_range(setting, message):
    with pytest.raises(UserError, match=message):
        SFTConfig(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 1},
        {"optim": "adamw_torch"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "unsloth"},
        {"max_length": 8, "max_seq_length": 8},
        {"warmup_steps": 0.1},
        {"max_grad_norm": 0},
        {"resume_from_checkpoint": True},
        {"resume_from_checkpoint": "run/checkpoint-5"},
        {"save_steps": 0, "eval_steps": None},
    ],
)
def test_valid_values_are_kept(setting):
    config = SFTConfig(**setting)
    assert {name: getattr(config, name) for name in setting} == setting


def test_every_default_is_valid_and_checked():
    SFTConfig()
    assert all("valid" in field.metadata for field in dataclasses.fields(SFTConfig))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SFTConfig().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_from_dict():
    assert SFTConfig.from_dict({"seed": 5, "packing": True}) == SFTConfig(seed=5, packing=True)
    with pytest.raises(
        UserError, match=r"Unknown key 'learning_rat' in section 'train': did you mean 'learning_rate'\?"
    ):
        SFTConfig.from_dict({"learning_rat": 1e-4}, "section 'train'")
    with pytest.raises(UserError, match="Unknown key 'zzz' in SFTConfig: it knows adam_beta1, "):
        SFTConfig.from_dict({"zzz": 1})


def test_a_path_is_a_directory_like_its_name() -> None:
    assert SFTConfig(output_dir=Path("out")) == SFTConfig(output_dir="out")  # pyright: ignore[reportArgumentType]
