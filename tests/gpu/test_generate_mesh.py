"""On two GPUs that divide heads and words, or rows: what is generated is what one GPU's model finds likeliest."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.workloads import SHAPES, random_packed_model
from fastjax import make_mesh
from fastjax.generate import Engine, engine, make_request
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama

pytestmark = pytest.mark.gpu

ROUNDING = 0.1  # of the logits' spread, in bfloat16


def model_on(mesh: jax.sharding.Mesh | None) -> Llama:
    model = random_packed_model(SHAPES["tiny"], mesh=mesh)
    add_lora(model, LoraConfig.create(r=16, lora_alpha=16))
    for number, lora in enumerate(lora_modules(model).values()):
        lora.b[...] = 0.02 * jax.random.normal(jax.random.key(number), lora.b[...].shape)
    return model


@functools.cache
def logits_alone() -> Callable[[jax.Array], jax.Array]:
    """Of one row, by one GPU's model; compiled once."""
    alone = model_on(None)
    return jax.jit(lambda ids: alone(ids)[0])


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("axis", "stored"), [("tensor", "int8"), ("data", None), ("fsdp", None)])
def test_the_text_is_that_of_one_gpu(axis: str, stored: str | None, monkeypatch) -> None:
    """Of short prompts and of one that is read in parts."""
    monkeypatch.setattr(engine, "FIRST_PASS", 512)
    monkeypatch.setattr(engine, "LATER_PASS", 256)
    rng = np.random.default_rng(0)
    requests = [make_request(rng.integers(3, 4000, size).tolist(), max_new_tokens=24) for size in (7, 700, 90, 33)]
    *_, done = Engine(model_on(make_mesh(**{axis: 2})), 4, stored).run(requests)
    for completion in done:
        text, start = completion.prompt + completion.tokens, len(completion.prompt)
        padded = np.zeros((1, 1024), np.int32)
        padded[0, : len(text)] = text
        logits = logits_alone()(jnp.asarray(padded))[start - 1 : len(text) - 1]
        chosen = logits[jnp.arange(24), jnp.asarray(completion.tokens)]
        spread = float(logits.std())
        assert float((logits.max(axis=-1) - chosen).max()) < ROUNDING * spread
        log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
        np.testing.assert_allclose(completion.logprobs, log_p, atol=ROUNDING * spread)
