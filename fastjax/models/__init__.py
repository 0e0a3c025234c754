"""Model families: one file each, over shared layers. Knows nothing of files, datasets or training."""

from fastjax.models.config import LlamaConfig, RopeConfig
from fastjax.models.layers import Frozen
from fastjax.models.llama import Llama, init_weights, param_specs
from fastjax.models.spec import ParamSpec

__all__ = ["Frozen", "Llama", "LlamaConfig", "ParamSpec", "RopeConfig", "init_weights", "param_specs"]
