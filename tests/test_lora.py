"""Which projections and layers LoRA goes on, and the errors for names that mean nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.errors import UserError
from fastjax.lora import LoraConfig, add_lora, find_linear, lora_modules, select_targets, trainable_parameters
from fastjax.models import Frozen, Llama, LlamaConfig, init_weights

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4
)


def base(**options: Any) -> Llama:
    return Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"self_attn.q_proj": (True, True, True)}),
        ({"target_modules": ["self_attn.q_proj"]}, {"self_attn.q_proj": (True, True, True)}),
        ({"target_modules": ["1.mlp.up_proj"]}, {"mlp.up_proj": (False, True, False)}),
        (
            {"target_modules": r".*\.2\.mlp\.(up|down)_proj"},
            {"mlp.up_proj": (False, False, True), "mlp.down_proj": (False, False, True)},
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {"self_attn.q_proj": (True, False, False)}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, {"self_attn.q_proj": (True, False, True)}),
    ],
)
def test_targets(options: dict, expected: dict) -> None:
    assert select_targets(LoraConfig.create(**options), 3) == expected


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_all_linear_is_the_default(targets: str | None) -> None:
    assert len(select_targets(LoraConfig.create(target_modules=targets), 3)) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "query; valid names are q_proj, k_proj"),
        ({"target_modules": []}, "valid names are"),
        ({"target_modules": "query"}, "matches no whole name"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": ["lm_head"]}, "lm_head; valid names"),
        ({"layers_to_transform": [3]}, r"0\.\.2"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["norm"]}, "lm_head, embed_tokens"),
        ({"r": 17}, "r=17 exceeds"),
    ],
)
def test_what_means_nothing_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(base(), LoraConfig.create(**options))


def test_a_second_lora_is_refused() -> None:
    model = base()
    add_lora(model, LoraConfig(r=2))
    with pytest.raises(UserError, match="already"):
        add_lora(model, LoraConfig(r=2))


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale(use_rslora: bool, scale: float) -> None:
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora).scale == scale


def test_only_lora_and_saved_modules_are_trained() -> None:
    model = base(trainable=True)
    everything = trainable_parameters(model)
    add_lora(model, LoraConfig.create(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert everything == 2 * 50 * 16 + 16 + 3 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)
    assert trainable_parameters(model) == 3 * 2 * (16 + 16) + 50 * 16
    assert isinstance(model.embed_tokens.weight, Frozen)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_layers_left_out_stay_as_they_were() -> None:
    model = base()
    add_lora(model, LoraConfig.create(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    lora = lora_modules(model)["self_attn.q_proj"]
    lora.b[...] = jnp.ones_like(lora.b[...])
    assert trainable_parameters(model) == 2 * (16 + 16)
    definition, state = nnx.split(find_linear(model, "self_attn.q_proj"))
    x = jax.random.normal(jax.random.key(1), (5, 16))
    for layer in range(3):
        linear = nnx.merge(definition, jax.tree.map(lambda leaf, index=layer: leaf[index], state))
        with_lora = np.asarray(linear(x))
        linear.lora = None
        assert (np.abs(with_lora - np.asarray(linear(x))).max() > 1e-3) == (layer == 1)
