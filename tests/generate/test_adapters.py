"""Several adapters on one base: each prompt's text is that of a model which carries its adapter alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fastjax.errors import UserError
from fastjax.generate import complete
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, init_weights
from fastjax.weights.adapter import load_adapter, save_adapter
from tests.generate.tiny import CONFIG

PROMPT = [5, 17, 60, 3]


def base() -> Llama:
    return Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> list[str]:
    """Of different ranks, scales, targets and layers."""
    made = []
    for number, options in enumerate(
        ({"r": 20, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}, {"r": 2, "lora_alpha": 8})
    ):
        lora = LoraConfig.create(**options, layers_to_transform=[1] if number else None)
        model = base()
        add_lora(model, lora)
        for index, module in enumerate(lora_modules(model).values()):
            key = jax.random.key(10 * number + index)
            module.b[...] = 0.3 * jax.random.normal(key, module.b[...].shape)
        directory = tmp_path_factory.mktemp("adapter")
        save_adapter(directory, model, lora, "base")
        made.append(str(directory))
    return made


def test_each_prompt_has_its_own(directories) -> None:
    """Greedy: each token is the likeliest after those before it, and as likely, by the whole model with that adapter."""
    chosen, prompts = [directories[0], None, directories[1]], [PROMPT, PROMPT, PROMPT]
    together = complete(base(), prompts, adapters=chosen, max_new_tokens=8, batch_size=2)
    for directory, done in zip(chosen, together, strict=True):
        model, start = base(), len(done.prompt) - 1
        if directory is not None:
            load_adapter(Path(directory), model)
        logits = model(jnp.asarray([done.prompt + done.tokens]))[0, start:-1]
        assert jnp.argmax(logits, axis=-1).tolist() == done.tokens
        log_p = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(8), jnp.asarray(done.tokens)]
        assert done.logprobs == pytest.approx(log_p.tolist(), rel=1e-3, abs=1e-4)
    assert len({tuple(done.tokens) for done in together}) == 3


def test_what_cannot_be_chosen(directories, tmp_path) -> None:
    model = base()
    with pytest.raises(UserError, match="names 1 for 2 prompts: give each its own, or None"):
        complete(model, [PROMPT, PROMPT], adapters=[None])
    with pytest.raises(UserError, match="holds no adapter; name a directory"):
        complete(model, [PROMPT], adapters=[tmp_path])
    lora = LoraConfig.create(modules_to_save=["lm_head"])
    own = base()
    add_lora(own, lora)
    save_adapter(tmp_path / "own", own, lora, "base")
    with pytest.raises(UserError, match="brings a head or an embedding of its own"):
        complete(model, [PROMPT], adapters=[tmp_path / "own"])
    with pytest.raises(UserError, match="carries an adapter already"):
        complete(own, [PROMPT], adapters=[directories[0]])
