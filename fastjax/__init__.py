"""fastjax: QLoRA fine-tuning of Llama-family models in JAX, on NVIDIA GPUs."""

from fastjax.api import FastLanguageModel
from fastjax.data import load_records
from fastjax.elsewhere import TOP_LEVEL
from fastjax.parallel.mesh import make_mesh
from fastjax.train.callbacks import EarlyStoppingCallback, TrainerCallback
from fastjax.train.config import SFTConfig
from fastjax.train.step import TrainState, init_train_state, make_train_step
from fastjax.train.trainer import SFTTrainer, train_on_responses_only

__version__ = "0.1.0"

__all__ = [
    "EarlyStoppingCallback",
    "FastLanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainState",
    "TrainerCallback",
    "init_train_state",
    "load_records",
    "make_mesh",
    "make_train_step",
    "train_on_responses_only",
]


def __getattr__(name: str) -> object:
    if instead := TOP_LEVEL.get(name):  # as an ImportError, whose words `from fastjax import ...` shows
        raise ImportError(f"fastjax has no {name}: {instead.words}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
