"""Named model shapes, and random checkpoints of them on disk with a real tokenizer and a real text to learn."""

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fastjax.models import Llama, LlamaConfig, ParamSpec, RopeConfig, param_specs
from fastjax.weights.placement import kept_shapes, make_target, shardings_of
from fastjax.weights.save import ExportTensor, save_weights
from pallas_kernels import NF4Array
from pallas_kernels.flash_attention.dropout import mixed
from pallas_kernels.workloads import MODELS, Model

LLAMA3_ROPE = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position=8192)


def _sizes(model: Model) -> dict[str, Any]:
    """Under LlamaConfig's names."""
    names = {"hidden": "hidden_size", "intermediate": "intermediate_size", "heads": "num_heads"}
    names |= {"kv_heads": "num_kv_heads", "vocabulary": "vocab_size"}
    return {names.get(name, name): size for name, size in dataclasses.asdict(model).items()}


LLAMA_8B = LlamaConfig(
    **_sizes(MODELS["llama3.1-8b"]),
    num_layers=32,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=LLAMA3_ROPE,
)
LARGER = {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64}
LARGEST = {"hidden_size": 16384, "intermediate_size": 53248, "num_layers": 126, "num_heads": 128}
SHAPES = {
    "llama3.1-8b": LLAMA_8B,
    "llama3.1-70b": dataclasses.replace(LLAMA_8B, **LARGER),
    "llama3.1-405b": dataclasses.replace(LLAMA_8B, **LARGEST),
    "tiny": dataclasses.replace(LLAMA_8B, **_sizes(MODELS["tiny"]), num_layers=2, rms_norm_eps=1e-6),
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


def random_packed_model(config: LlamaConfig, seed: int = 0, mesh: Mesh | None = None, **options: Any) -> Llama:
    """The same kind of model made on the devices, each share where it belongs and never whole anywhere: projections are
    random NF4 codes, which is what normal weights pack to, as every code is as likely as any other.
    """
    weights = {}
    for index, (name, spec) in enumerate(param_specs(config).items()):
        target = make_target(spec, quantize=bool(spec.quantize and spec.layers), dtype=jnp.bfloat16, mesh=mesh)
        kept = kept_shapes(target, jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16))
        make = jax.jit(partial(_random_parameter, spec, config, kept), out_shardings=shardings_of(target, kept))
        weights[name] = make(np.uint32(1009 * seed + 2 * index))
    return Llama(config, weights, dtype=jnp.bfloat16, **options)


def _random_parameter(spec: ParamSpec, config: LlamaConfig, kept: Any, seed: jax.Array) -> Any:
    """Like `kept`, the shapes of the parameter's leaves."""
    if isinstance(kept, NF4Array):
        assert kept.nested_scales is not None
        assert kept.offset is not None
        widest = 2 * config.initializer_range  # about the largest of 64 normal values
        return dataclasses.replace(
            kept,
            codes=(_words(kept.codes.shape, seed) >> 24).astype(jnp.uint8),
            scales=(_words(kept.scales.shape, seed + jnp.uint32(1)) >> 24).astype(jnp.uint8),
            nested_scales=jnp.full(kept.nested_scales.shape, widest / 8, jnp.float32),
            offset=jnp.full(kept.offset.shape, widest, jnp.float32),
        )
    if spec.init == "normal":
        # the sum of four bytes, which is as good as normal here
        words = _words(kept.shape, seed)
        total = jnp.float32(-510) + sum(((words >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24))
        return (total * (config.initializer_range / 147.8)).astype(kept.dtype)
    return jnp.full(kept.shape, 1.0 if spec.init == "ones" else 0.0, kept.dtype)


def _words(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """A random uint32 for each place, of its indices alone: any share of it is one loop without other memory, which
    jax.random does not promise.
    """
    words = mixed(jnp.full(shape, seed, jnp.uint32))
    for dimension in range(len(shape)):
        words = mixed(words + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension))
    return words


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
