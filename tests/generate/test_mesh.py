"""On a mesh a model says what it says on one device: with heads, words and rows divided, and layers in shares."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from fastjax.errors import UserError
from fastjax.generate import Completion, Engine, make_request, steps
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, LlamaConfig, param_specs
from fastjax.parallel.hosts import onto_mesh
from fastjax.parallel.mesh import make_mesh
from fastjax.weights.placement import make_target, shardings_of
from pallas_kernels import NF4Array

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    initializer_range=0.15,
    attention_bias=True,
    max_position_embeddings=256,
)
CHANCE = np.random.default_rng(0)
REQUESTS = [
    make_request(CHANCE.integers(0, 100, size).tolist(), max_new_tokens=8, temperature=1.2 * (n % 2), seed=5)
    for n, size in enumerate((5, 1, 40, 17, 33, 9, 16, 25))
]


def packed_model(mesh: Mesh | None = None) -> Llama:
    """Random codes and values, the same each time, each share where it belongs; LoRA on all linears, not on the mesh."""
    weights: dict[str, Any] = {}
    for name, spec in param_specs(CONFIG).items():
        chance = np.random.default_rng(len(weights))
        target = make_target(spec, quantize=spec.quantize, dtype=jnp.float32, mesh=mesh)
        value = 0.15 * chance.normal(size=spec.stacked_shape).astype(np.float32) + (spec.init == "ones")
        if spec.quantize:
            layers, out, into = spec.stacked_shape
            codes = chance.integers(0, 256, (layers, out, into // 2), np.uint8)
            value = NF4Array(codes, np.full((layers, out, into // 64), 0.3, np.float32), None, None)  # pyright: ignore
        weights[name] = jax.device_put(value, shardings_of(target, value))
    model = Llama(CONFIG, weights, dtype=jnp.float32)
    add_lora(model, LoraConfig.create(r=16, lora_alpha=8))
    for index, lora in enumerate(lora_modules(model).values()):
        lora.b[...] = 0.1 * np.random.default_rng(index).normal(size=lora.b[...].shape).astype(np.float32)
    return model


def texts(model: Llama, **options: Any) -> Sequence[Completion]:
    *_, done = Engine(model, 4, kv_cache_dtype="int8", **options).run(REQUESTS, steps=8)
    return done


def test_the_text_is_that_of_one_device() -> None:
    """Greedy and drawn, of prompts of many lengths, from a cache in 8 bits; the other half in slots that the first has left."""
    mesh = make_mesh(tensor=2, data=2, fsdp=2)
    model = packed_model(mesh)
    engine = Engine(model, 4)
    keys = engine.empty_slots(4, 1).cache.stack.keys
    assert keys.addressable_shards[0].data.shape == (2, 1, 1, 64, 32)  # one of four rows, one of two heads
    codes = engine.parameters["layers"]["mlp"]["down_proj"]["weight"].get_value().codes
    assert codes.addressable_shards[0].data.size * 2 * mesh.shape["fsdp"] == codes.size
    found = texts(model, prompt_lookup_num_tokens=1)
    compiled = steps.decode._cache_size()
    texts(model, prompt_lookup_num_tokens=1)
    assert steps.decode._cache_size() == compiled
    for mine, theirs in zip(found, texts(packed_model()), strict=True):
        assert (mine.tokens, mine.reason) == (theirs.tokens, theirs.reason)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=2e-3, atol=1e-4)


def test_weights_packed_for_one_device_are_refused() -> None:
    model = packed_model()
    nnx.update(model, onto_mesh(nnx.state(model), make_mesh(tensor=2)))
    with pytest.raises(UserError, match=r"proj.weight does not lie on the mesh as its rules say; load the model with"):
        Engine(model, 1)
