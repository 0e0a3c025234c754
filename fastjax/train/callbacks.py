"""Callbacks: code of the user's that a run calls at its turns, with the names that TRL and transformers gave them.

A callback sees `args` (the SFTConfig), `state` (how far the run is) and `control`, in which it may set what should happen
after this step. Metrics of a step arrive a little after it; log records, given to `on_log`, are complete.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from fastjax.errors import UserError
from fastjax.train.config import SFTConfig
from fastjax.train.metrics import LogRecord

BEST_METRIC = "eval_loss"


@dataclasses.dataclass
class TrainerState:
    """How far a run is."""

    global_step: int
    max_steps: int
    epoch: float
    log_history: list[LogRecord]

    @property
    def evaluations(self) -> list[LogRecord]:
        return [record for record in self.log_history if BEST_METRIC in record]

    @property
    def best_evaluation(self) -> LogRecord | None:
        """The record of the lowest evaluation loss, the first of equal ones."""
        return min(self.evaluations, key=lambda record: record[BEST_METRIC], default=None)


@dataclasses.dataclass
class TrainerControl:
    """What is to happen after this step; the run clears what it has done."""

    should_training_stop: bool = False
    should_evaluate: bool = False
    should_save: bool = False
    should_log: bool = False


class TrainerCallback:
    """Does nothing; a callback overrides what it wants to hear of. `kwargs` has `model` and what the turn adds."""

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_log(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...


class EarlyStoppingCallback(TrainerCallback):
    """Stops the run once `early_stopping_patience` evaluations in a row were not better, by more than the threshold, than
    the best before them. It reads the log alone, so that a resumed run stops where the whole one would.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        if early_stopping_patience < 1:
            raise UserError(f"{early_stopping_patience=} must be at least 1.")
        self.patience = early_stopping_patience
        self.threshold = early_stopping_threshold

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best, worse = float("inf"), 0
        for record in state.evaluations:
            if record[BEST_METRIC] < best - self.threshold:
                best, worse = record[BEST_METRIC], 0
            else:
                worse += 1
        if worse >= self.patience:
            control.should_training_stop = True


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """All callbacks of a run as one."""

    members: list[TrainerCallback]
    args: SFTConfig
    state: TrainerState
    control: TrainerControl
    model: Any

    def call(self, event: str, **kwargs: Any) -> None:
        for member in self.members:
            getattr(member, event)(self.args, self.state, self.control, model=self.model, **kwargs)


def check_callbacks(callbacks: Iterable[Any]) -> list[TrainerCallback]:
    """The callbacks as objects; a class is made one, as in transformers."""
    made = [member() if isinstance(member, type) else member for member in callbacks]
    for member in made:
        if not isinstance(member, TrainerCallback):
            raise UserError(f"callback {member!r} is none: derive its class from fastjax.TrainerCallback.")
    return made
