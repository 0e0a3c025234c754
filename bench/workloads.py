"""Named model shapes, and random checkpoints of them on disk with a real tokenizer and a real text to learn."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastjax.models import Llama, LlamaConfig, ParamSpec, RopeConfig, param_specs
from fastjax.weights.save import ExportTensor, save_weights
from pallas_kernels import quantize_nf4

LLAMA3_ROPE = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position=8192)
SHAPES = {
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=LLAMA3_ROPE,
    ),
    "tiny": LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope=LLAMA3_ROPE,
    ),
}
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
TOKENIZER_VOCABULARY = 4096


def write_random_checkpoint(directory: Path, config: LlamaConfig, seed: int = 0) -> None:
    """A HF checkpoint in bfloat16: normal weights, norms of one, a tokenizer trained on the standard library."""
    save_weights(directory, _random_tensors(config, seed))
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config.to_hf() | ids | {"dtype": "bfloat16"}, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(ids))
    _train_tokenizer().save_pretrained(str(directory))


def _random_tensors(config: LlamaConfig, seed: int) -> Iterator[ExportTensor]:
    key = jax.random.key(seed)
    count = 0
    for spec in param_specs(config).values():
        for name in spec.hf_names():
            count += 1
            subkey = jax.random.fold_in(key, count)
            yield ExportTensor(name, spec.shape, np.dtype(jnp.bfloat16), lambda s=spec, k=subkey: _random(s, k, config))


def _random(spec: ParamSpec, key: jax.Array, config: LlamaConfig) -> np.ndarray:
    if spec.init == "normal":
        return np.asarray(config.initializer_range * jax.random.normal(key, spec.shape, jnp.bfloat16))
    return np.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, jnp.bfloat16)


def random_packed_model(config: LlamaConfig, seed: int = 0, **options: Any) -> Llama:
    """The same kind of model made on the device: random weights in bfloat16, the projections packed to NF4."""
    weights: dict[str, Any] = {}
    pack = jax.jit(lambda key, spec: quantize_nf4(_normal(spec, key, config)), static_argnums=1)
    for (name, spec), key in zip(param_specs(config).items(), jax.random.split(jax.random.key(seed), 99), strict=False):
        if spec.quantize and spec.layers:
            layers = [pack(layer_key, spec) for layer_key in jax.random.split(key, spec.layers)]
            weights[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        elif spec.init == "normal":
            weights[name] = _normal(spec, key, config)
        else:
            weights[name] = jnp.full(spec.stacked_shape, 1.0 if spec.init == "ones" else 0.0, jnp.bfloat16)
    return Llama(config, weights, dtype=jnp.bfloat16, **options)


def _normal(spec: ParamSpec, key: jax.Array, config: LlamaConfig) -> jax.Array:
    return (config.initializer_range * jax.random.normal(key, spec.shape, jnp.float32)).astype(jnp.bfloat16)


def standard_library_texts(characters: int) -> list[str]:
    """Sources of Python's standard library, the text that every machine has, up to so many characters."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text("utf-8", errors="ignore"))
        total += len(texts[-1])
        if total >= characters:
            break
    return texts


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library_texts(2_000_000), trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
