"""Log records sent elsewhere: TensorBoard's files, Weights & Biases. Each is a callback."""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastjax.errors import UserError
from fastjax.train.callbacks import TrainerCallback, TrainerControl, TrainerState
from fastjax.train.config import SFTConfig
from fastjax.train.metrics import LogRecord

FOLDER = "runs"


def scalars(record: LogRecord) -> dict[str, float]:
    """What of a record is drawn over the steps, by the names transformers' reports have: train/loss, eval/loss."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in numbers.items()
        if math.isfinite(value)
    }


class TensorBoardCallback(TrainerCallback):
    """Event files in output_dir/runs."""

    def __init__(self) -> None:
        self.module = required("tensorboardX", "tensorboard")
        self.writer: Any = None

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # what was drawn past the step a run resumes from, before a kill, is not shown
        folder = str(Path(args.output_dir) / FOLDER)
        self.writer = self.module.SummaryWriter(folder, purge_step=state.global_step + 1)

    def on_log(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in scalars(kwargs["logs"]).items():
            self.writer.add_scalar(name, value, kwargs["logs"]["step"])
        self.writer.flush()

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbCallback(TrainerCallback):
    """A Weights & Biases run; project and entity are read from its own environment variables."""

    def __init__(self) -> None:
        self.module = required("wandb", "wandb")
        self.run: Any = None

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run = self.module.init(name=args.run_name, dir=args.output_dir, config=dict(vars(args)))

    def on_log(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.log(scalars(kwargs["logs"]), step=kwargs["logs"]["step"])

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run is not None:
            self.run.finish()


REPORTERS = {"tensorboard": TensorBoardCallback, "wandb": WandbCallback}


def make_reporters(report_to: str | Sequence[str] | None) -> list[TrainerCallback]:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [REPORTERS[name]() for name in names if name != "none"]


def required(module: str, extra: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"report_to={extra!r} needs {module}: pip install 'fastjax[{extra}]', or set report_to to none."
        )
    return importlib.import_module(module)
