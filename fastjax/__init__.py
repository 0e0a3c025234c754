"""fastjax: QLoRA fine-tuning of Llama-family models in JAX, on NVIDIA GPUs."""

from fastjax.api import FastLanguageModel
from fastjax.parallel.mesh import make_mesh
from fastjax.train.config import SFTConfig
from fastjax.train.step import TrainState, init_train_state, make_train_step
from fastjax.train.trainer import SFTTrainer

__version__ = "0.1.0"

__all__ = [
    "FastLanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainState",
    "init_train_state",
    "make_mesh",
    "make_train_step",
]
