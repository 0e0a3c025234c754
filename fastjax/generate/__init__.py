"""Generation: a model's continuation of prompts, with a key/value cache."""

from fastjax.generate.engine import Completion, Engine, Request
from fastjax.generate.generate import complete, generate, make_request, stream
from fastjax.generate.sampling import Sampling

__all__ = ["Completion", "Engine", "Request", "Sampling", "complete", "generate", "make_request", "stream"]
