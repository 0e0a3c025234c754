"""The programs of a GPU, traced where there is none: every Triton kernel is called with the arguments that it takes.

jax-triton itself cannot be imported without a GPU's jax. Here it is replaced by a check of each call against its kernel's
signature, as jax-triton 0.3 fills it: the inputs, then all outputs, then the constants by name.
"""

import importlib
import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench.workloads import SHAPES, random_packed_model
from fastjax import init_train_state, make_train_step
from fastjax.generate import Sampling, steps
from fastjax.generate import engine as generation
from fastjax.generate.sampling import RowSampling
from fastjax.lora import LoraConfig, add_lora
from fastjax.train.optimizers import make_optimizer
from pallas_kernels import triton_call
from pallas_kernels.nf4 import grouped_launch

tl = pytest.importorskip("triton.language")


class Calls:
    """Stands in for the module jax_triton."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def triton_call(
        self, *arrays: Any, kernel: Any, out_shape: Any, grid: tuple, input_output_aliases: dict, **rest: Any
    ):
        parameters = inspect.signature(kernel.fn).parameters
        constants = [name for name, each in parameters.items() if each.annotation is tl.constexpr]
        outputs = jax.tree.leaves(out_shape)
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        assert len(parameters) - len(constants) == len(arrays) + len(outputs), name
        assert set(rest) - {"num_warps", "num_stages"} == set(constants), name
        assert all(isinstance(size, int) and size > 0 for size in grid), (name, grid)
        for place, output in input_output_aliases.items():
            assert (arrays[place].shape, arrays[place].dtype) == (outputs[output].shape, outputs[output].dtype), name
        self.kernels.add(name)
        return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), out_shape)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """As on a Hopper GPU with jax-triton installed."""
    found = Calls()
    for module in list(sys.modules.values()):
        if module.__name__.startswith("pallas_kernels") and hasattr(module, "cuda_capability"):
            monkeypatch.setattr(module, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(triton_call, "_installed", lambda: True)
    for module in (triton_call, grouped_launch):
        monkeypatch.setattr(module, "has_room", lambda: True)
    import_module = importlib.import_module
    fake = types.SimpleNamespace(triton_call=found.triton_call)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake if name == "jax_triton" else import_module(name))
    return found


@pytest.fixture(scope="module")
def model():
    packed = random_packed_model(SHAPES["tiny"], scan_layers=False)
    add_lora(packed, LoraConfig.create(r=16, lora_alpha=16))
    return packed


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_training_step(model, calls: Calls, policy: str) -> None:
    optimizer = make_optimizer("adamw_8bit", learning_rate=1e-4)
    state = init_train_state(model, optimizer)
    step = make_train_step(model, optimizer, gradient_checkpointing=policy)
    ids = jnp.zeros((2, 256), jnp.int32)
    step.trace(state, {"input_ids": ids, "labels": ids, "segment_ids": ids + 1})  # pyright: ignore
    ops = {name.split(".")[1] for name in calls.kernels}
    assert {"nf4", "rms_norm", "rope", "swiglu", "low_rank", "linear_cross_entropy"} <= ops


def test_prefill_and_decoding(model, calls: Calls) -> None:
    engine = generation.Engine(model, 4)
    slots = engine.empty_slots(4, 2)
    tokens, counts = jnp.zeros((4, 64), jnp.int32), jnp.full(4, 50, jnp.int32)
    steps.read_prompts.trace(engine.layout, engine.parameters, slots.cache, tokens, counts, True)
    prefill = set(calls.kernels)
    steps.decode.trace(engine.layout, engine.parameters, slots, RowSampling.of([Sampling()] * 4), 8)
    kernels = {name.rsplit(".", 1)[1] for name in calls.kernels - prefill}
    assert kernels == {"norm_kernel", "linears_kernel", "whole_kernel", "project_kernel", "swiglu_kernel"}
