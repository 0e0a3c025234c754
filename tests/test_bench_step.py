"""The limit that a step is held against counts what each policy has backward do again."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bench.step import attention_flops, flops_per_token
from fastjax import init_train_state, make_train_step
from fastjax.models import Llama, LlamaConfig, init_weights
from fastjax.models.decoder import POLICIES

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=256, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32
)
TOKENS = 16  # of one row
SHAPE = re.compile(r"%(\S+) = \w+\[([\d,]*)\]")
PRODUCT = re.compile(r"%(\S+) = \S+ dot\(%([^\s,]+), .*?lhs_contracting_dims=\{([\d,]+)\}")


def product_flops(program: str) -> int:
    """Of all matrix products in a compiled program without loops."""
    shapes = {name: list(map(int, re.findall(r"\d+", sizes))) for name, sizes in SHAPE.findall(program)}
    inner = {out: [shapes[left][int(at)] for at in dims.split(",")] for out, left, dims in PRODUCT.findall(program)}
    return sum(2 * math.prod(shapes[out] + sizes) for out, sizes in inner.items())


def test_what_is_done_again() -> None:
    """As compiled, where what nothing reads is gone, of one layer with its first norm trained alone."""
    model, optimizer = Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32), optax.sgd(1.0)
    norm = model.layers.input_layernorm
    norm.weight = nnx.Param(norm.weight[...])
    state, ids = init_train_state(model, optimizer), jnp.ones((1, TOKENS), jnp.int32)

    def compiled(gradient_checkpointing: str) -> int:
        step: Any = make_train_step(model, optimizer, gradient_checkpointing=gradient_checkpointing)
        return product_flops(step.lower(state, {"input_ids": ids, "labels": ids}).compile().as_text())

    def counted(*runs: Any) -> float:
        length = 2 * TOKENS  # here attention is of the whole square
        return TOKENS * flops_per_token(CONFIG, length, runs)

    none, full, offload, offload_o = (counted((policy, 1)) for policy in POLICIES)
    assert compiled("full") - compiled("none") == full - none
    assert full - offload_o == TOKENS * attention_flops(CONFIG, 2 * TOKENS)
    assert offload == full
    assert counted(("full", 3), ("none", 5)) - none == 3 * (full - none)
