"""SFTConfig: every setting of a fine-tuning run, by the names `TrainingArguments` and TRL gave them.

Each field states its default and its valid values once, side by side; the check and its error message come from that.
"""

import dataclasses
import enum
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastjax.data.options import BAD_ROWS_CHOICES, OVERLONG_CHOICES, DataOptions
from fastjax.elsewhere import SFT_CONFIG, answering, understood
from fastjax.errors import UserError
from fastjax.parallel.compressed import REDUCTIONS
from fastjax.train.optimizers import ALIASES, DIRECTIONS
from fastjax.train.recompute import CHOICES as CHECKPOINTING
from fastjax.train.schedules import SCHEDULES


class Valid(NamedTuple):
    """A test of a value, and the words that complete "must be ..."."""

    test: Callable[[Any], bool]
    words: str


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(at_least: int) -> Valid:
    return Valid(lambda value: is_whole(value) and value >= at_least, f"a whole number of at least {at_least}")


def number(words: str, test: Callable[[float], bool]) -> Valid:
    return Valid(lambda value: is_number(value) and test(value), f"a number {words}")


def one_of(*choices: Any) -> Valid:
    words = f"one of {', '.join(map(repr, choices))}"
    return Valid(
        lambda value: any(value is choice or (value == choice and isinstance(value, str)) for choice in choices), words
    )


def one_or_more(*choices: str) -> Valid:
    single = one_of(*choices)
    return Valid(
        lambda value: all(map(single.test, value)) if isinstance(value, list) else single.test(value),
        f"{single.words}, or a list of them",
    )


def either(valid: Valid, constant: Any) -> Valid:
    return Valid(lambda value: value is constant or valid.test(value), f"{valid.words}, or {constant}")


POSITIVE = number("above 0", lambda value: value > 0)
NOT_NEGATIVE = number("of at least 0", lambda value: value >= 0)
FRACTION = number("of at least 0 and below 1", lambda value: 0 <= value < 1)
FLAG = one_of(True, False)
STRINGS = Valid(
    lambda value: isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value),
    "a list of non-empty strings",
)
STRATEGIES = ("no", "steps", "epoch")
NAME = Valid(lambda value: isinstance(value, str) and value != "", "a non-empty string")


def setting(default: Any, valid: Valid) -> Any:
    return dataclasses.field(default=default, metadata={"valid": valid})


def plain(value: Any) -> Any:
    """A number of numpy's, a member of transformers' enumerations or a path as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value.value if isinstance(value, enum.Enum) else value


@answering(SFT_CONFIG, "SFTConfig")
@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The settings of a run; a wrong value raises at once, naming the field."""

    output_dir: str = setting("trainer_output", NAME)
    _: dataclasses.KW_ONLY

    # data
    dataset_text_field: str = setting("text", NAME)
    completion_only_loss: bool = setting(True, FLAG)  # for prompt and completion
    assistant_only_loss: bool = setting(False, FLAG)  # for messages; needs {% generation %} in the chat template
    max_length: int | None = setting(None, either(whole(2), None))  # tokens in a row; None: the model's max_seq_length
    max_seq_length: int | None = setting(None, either(whole(2), None))  # max_length's older name
    packing: bool = setting(False, FLAG)  # several examples a row, without attention between them
    instruction_part: str | None = setting(None, either(NAME, None))  # what introduces the user's turn in a text
    response_part: str | None = setting(None, either(NAME, None))  # the assistant's; the loss is on what follows it
    overlong: str = setting("truncate", one_of(*OVERLONG_CHOICES))  # what is done with examples over max_length
    bad_rows: str = setting("error", one_of(*BAD_ROWS_CHOICES))  # "drop" leaves them out and counts them

    # length of the run
    per_device_train_batch_size: int = setting(8, whole(1))  # rows
    per_device_eval_batch_size: int = setting(8, whole(1))
    gradient_accumulation_steps: int = setting(1, whole(1))
    num_train_epochs: float = setting(3.0, POSITIVE)
    max_steps: int = setting(-1, Valid(lambda value: is_whole(value) and (value == -1 or value > 0), "-1 or above 0"))

    # optimizer
    optim: str = setting("adamw_8bit", one_of(*DIRECTIONS, *ALIASES))
    learning_rate: float = setting(2e-4, POSITIVE)
    lr_scheduler_type: str = setting("linear", one_of(*SCHEDULES))
    warmup_steps: float = setting(0, NOT_NEGATIVE)  # below 1 a share of the run; above 0 it goes before warmup_ratio
    warmup_ratio: float = setting(0.0, FRACTION)
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, FRACTION)
    adam_beta2: float = setting(0.999, FRACTION)
    adam_epsilon: float = setting(1e-8, POSITIVE)
    max_grad_norm: float = setting(1.0, NOT_NEGATIVE)  # 0: gradients are not clipped
    neftune_noise_alpha: float | None = setting(None, either(POSITIVE, None))  # noise on the embeddings, in training

    bf16: bool = setting(False, FLAG)  # True: the model must compute in bfloat16, as from_pretrained loaded it
    fp16: bool = setting(False, FLAG)  # in float16

    # logging, evaluation, checkpoints; all in steps
    logging_steps: int = setting(10, whole(1))
    eval_strategy: str | None = setting(None, either(one_of(*STRATEGIES), None))  # None: as eval_steps says
    eval_steps: int | None = setting(None, either(whole(1), None))  # None: only after the last step
    save_strategy: str = setting("steps", one_of(*STRATEGIES))
    save_steps: int = setting(500, whole(0))  # 0: no checkpoints
    save_total_limit: int | None = setting(None, either(whole(1), None))  # None: all are kept
    resume_from_checkpoint: bool | str = setting(
        False, either(either(NAME, True), False)
    )  # True: the latest; "auto": if any
    load_best_model_at_end: bool = setting(False, FLAG)  # the model of the lowest eval_loss, saved whenever it is found
    early_stopping_patience: int | None = setting(None, either(whole(1), None))  # evaluations without a lower eval_loss
    eval_prompts: Sequence[str] = setting((), STRINGS)  # continued, greedily, at every evaluation
    eval_max_new_tokens: int = setting(64, whole(1))
    disable_tqdm: bool = setting(False, FLAG)  # True: nothing is printed
    report_to: str | Sequence[str] | None = setting("none", either(one_or_more("none", "tensorboard", "wandb"), None))
    run_name: str | None = setting(None, either(NAME, None))

    seed: int = setting(3407, whole(0))
    gradient_checkpointing: str | bool = setting("auto", one_of(*CHECKPOINTING, "unsloth", True, False))
    gradient_reduction: str = setting("full", one_of(*REDUCTIONS))  # what devices send each other of their gradients

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, valid = plain(getattr(self, field.name)), field.metadata["valid"]
            object.__setattr__(self, field.name, value)
            if not valid.test(value):
                raise UserError(f"{field.name}={value!r} is not valid: it must be {valid.words}.")
        if self.eval_strategy == "no" and (
            self.load_best_model_at_end or self.early_stopping_patience or self.eval_prompts
        ):
            raise UserError(
                "load_best_model_at_end, early_stopping_patience and eval_prompts go by evaluations, and eval_strategy='no'"
                " has none: choose 'steps' or 'epoch'."
            )
        if None not in (self.max_length, self.max_seq_length) and self.max_length != self.max_seq_length:
            raise UserError(f"{self.max_length=} and {self.max_seq_length=} name the same setting: give one of them.")

    @property
    def data_options(self) -> DataOptions:
        """The settings of tokenising."""
        names = {field.name for field in dataclasses.fields(DataOptions)} - {"text_field"}
        return DataOptions(text_field=self.dataset_text_field, **{name: getattr(self, name) for name in names})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "SFTConfig") -> "SFTConfig":
        """From a mapping, such as a section of a YAML file; `where` names it in errors."""
        return cls(**understood(settings, [field.name for field in dataclasses.fields(cls)], SFT_CONFIG, where))
