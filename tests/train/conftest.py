"""A model and a tokenizer for tests of the trainer: small enough to train in a second."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastjax import FastLanguageModel
from fastjax.models import Llama, LlamaConfig, init_weights, param_specs
from fastjax.parallel.rules import partition_spec

TINY = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 258 in all."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compile_each_program_once(compiled):
    """Many runs here are the same program, in one file and in others; a cache on disk serves those after the first."""
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def on_mesh(weights: dict[str, jax.Array], config: LlamaConfig, mesh: Mesh) -> dict[str, jax.Array]:
    placed = {}
    for name, spec in param_specs(config).items():
        axes = partition_spec(spec.axes, mesh)
        where = PartitionSpec(*[None] * (spec.layers is not None), *axes)
        placed[name] = jax.device_put(weights[name], NamedSharding(mesh, where))
    return placed


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer) -> Callable[..., FastLanguageModel]:
    """tiny_model(r=..., hidden_size=..., **LoRA options): the same weights each time; r=0 attaches no LoRA."""

    def make(r: int = 4, mesh: Mesh | None = None, **options) -> FastLanguageModel:
        config = LlamaConfig(**TINY | {key: options.pop(key) for key in list(options) if key in TINY})
        weights = init_weights(config, jax.random.key(0))
        if mesh is not None:
            weights = on_mesh(weights, config, mesh)
        module = Llama(config, weights, dtype=jnp.float32, trainable=r == 0)
        model = FastLanguageModel(module, tiny_tokenizer, name="tiny", max_seq_length=64, mesh=mesh)
        return FastLanguageModel.get_peft_model(model, r=r, **options) if r else model

    return make
