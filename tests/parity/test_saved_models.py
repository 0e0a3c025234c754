"""Whole models out, and text from them, against transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastjax import FastLanguageModel
from fastjax.errors import UserError
from fastjax.lora import lora_modules
from pallas_kernels import dequantize_nf4

LOADING = {"dtype": "float32", "progress": False}


def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 131, (2, 32)).astype(np.int32)


def with_lora(directory: Path, **options: Any) -> FastLanguageModel:
    """Loaded, and adapted by a LoRA that changes much."""
    model, _ = FastLanguageModel.from_pretrained(directory, **LOADING)
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **options)
    for index, lora in enumerate(lora_modules(model.module).values()):
        lora.b[...] = 0.1 * jax.random.normal(jax.random.key(index), lora.b[...].shape)
    return model


def read(directory: Path, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(("tied", "saved"), [(True, ()), (False, ("lm_head",)), (True, ("lm_head",))])
def test_merged(tied: bool, saved: tuple, make_model: Any, tmp_path: Path) -> None:
    directory, _ = make_model(tie_word_embeddings=tied)
    model = with_lora(directory, modules_to_save=saved)
    if saved:
        model.module.lm_head.weight[...] *= 1.5
    model.save_pretrained_merged(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is (tied and not saved)
    ours, theirs = np.asarray(model(tokens())), read(tmp_path / "merged", tokens())
    assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)


def test_merged_weights_are_rounded_once(make_model: Any, tmp_path: Path) -> None:
    directory, _ = make_model()
    model = with_lora(directory)
    model.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    layer, linear = 1, model.module.layers.mlp.down_proj
    base = np.asarray(dequantize_nf4(linear.weight.get_value(), jnp.float32), np.float64)[layer]
    a, b = (np.asarray(x[...], np.float64)[layer] for x in (linear.lora.a, linear.lora.b))
    exact = base + 2.0 * (a @ b).T
    stored = merged[f"model.layers.{layer}.mlp.down_proj.weight"].double().numpy()
    np.testing.assert_allclose(stored, exact, rtol=2**-8 * 1.01, atol=1e-7)


def test_a_model_without_lora_is_saved_as_it_is(make_model: Any, tmp_path: Path) -> None:
    directory, reference = make_model(attention_bias=True, mlp_bias=True)
    model, _ = FastLanguageModel.from_pretrained(directory, load_in_4bit=False, full_finetuning=True, **LOADING)
    model.save_pretrained(tmp_path / "copy")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32).state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(copied[name], value), name


def test_an_unknown_save_method_is_refused(make_model: Any, tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(make_model()[0], **LOADING)
    with pytest.raises(UserError, match="merged_16bit"):
        model.save_pretrained_merged(tmp_path / "merged", save_method="merged_8bit")
    assert not (tmp_path / "merged").exists()


def test_full_finetuning_of_packed_weights_is_refused(make_model: Any) -> None:
    with pytest.raises(UserError, match="load_in_4bit=False"):
        FastLanguageModel.from_pretrained(make_model()[0], full_finetuning=True, **LOADING)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_unknown_dtypes_are_refused(dtype: str, make_model: Any) -> None:
    with pytest.raises(UserError, match="bfloat16, float16, float32"):
        FastLanguageModel.from_pretrained(make_model()[0], dtype=dtype)


def test_greedy_generation_is_transformers(make_model: Any) -> None:
    """Prompts of different lengths, past a bucket's boundary, with tied words and stretched positions."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    directory, reference = make_model(max_position_embeddings=128, tie_word_embeddings=True, rope_parameters=rope)
    model, _ = FastLanguageModel.from_pretrained(directory, load_in_4bit=False, **LOADING)
    prompts = [tokens()[0, :5].tolist(), tokens()[1].tolist()]
    ours = FastLanguageModel.for_inference(model).generate(prompts, max_new_tokens=40, eos_token_id=None)
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert text == theirs[0].tolist()


def test_generation_stops_and_samples(make_model: Any) -> None:
    directory, _ = make_model()
    model, _ = FastLanguageModel.from_pretrained(directory, load_in_4bit=False, **LOADING)
    prompt = tokens()[:1, :5]
    greedy = model.generate(prompt, max_new_tokens=10)[0]
    stop = greedy[7]
    stopped = model.generate(prompt, max_new_tokens=10, eos_token_id=stop)[0]
    assert stopped == greedy[: greedy.index(stop, 5) + 1]
    draws = [model.generate(prompt, max_new_tokens=10, temperature=5.0, seed=seed)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(UserError, match="at least one"):
        model.generate([[]])
