"""Logits against transformers on random tiny models, for every option of the config."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fastjax import FastLanguageModel
from fastjax.models import param_specs
from pallas_kernels import NF4Array, dequantize_nf4

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no grouping": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "rope linear": {"rope_parameters": ROPES["linear"]},
    "rope dynamic": {"rope_parameters": ROPES["dynamic"]},
    "rope llama3": {"rope_parameters": ROPES["llama3"]},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "eps": {"rms_norm_eps": 1e-2},
}


def tokens(batch: int = 2, length: int = 96) -> np.ndarray:
    """Longer than the original context of 64, so that `dynamic` has something to do."""
    return np.random.default_rng(1).integers(0, 131, (batch, length)).astype(np.int32)


def torch_logits(model: LlamaForCausalLM, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **options).logits.float().numpy()


def relative_error(ours: Any, reference: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits(name: str, make_model: Any) -> None:
    directory, reference = make_model(**CONFIGS[name])
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="float32", load_in_4bit=False, progress=False)
    ids = tokens()
    assert relative_error(model(ids), torch_logits(reference, ids)) < 1e-4


def test_options_matter(make_model: Any) -> None:
    """Each RoPE scaling moves the logits by far more than the tolerance: the comparison above can fail."""
    ids = tokens()
    _, plain = make_model()
    for rope in ROPES.values():
        _, scaled = make_model(rope_parameters=rope)
        assert relative_error(torch_logits(scaled, ids), torch_logits(plain, ids)) > 1e-2


def test_scanned_and_unrolled_layers_agree(make_model: Any) -> None:
    directory, _ = make_model()
    logits = []
    for scan_layers in (True, False):
        model, _ = FastLanguageModel.from_pretrained(
            directory, dtype="float32", scan_layers=scan_layers, progress=False
        )
        logits.append(np.asarray(model(tokens())))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "biases", "head_dim", "tied"])
def test_4bit_logits_are_those_of_the_dequantised_weights(name: str, make_model: Any) -> None:
    directory, reference = make_model(**CONFIGS[name])
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="float32", load_in_4bit=True, progress=False)
    before = torch_logits(reference, tokens())
    put_dequantised_weights(model, reference)
    after = torch_logits(reference, tokens())
    assert relative_error(before, after) > 1e-2  # quantising changed something
    assert relative_error(model(tokens()), after) < 1e-4


def put_dequantised_weights(model: FastLanguageModel, reference: LlamaForCausalLM) -> None:
    parameters = dict(reference.named_parameters())
    for name, spec in param_specs(model.config).items():
        if not spec.quantize:
            continue
        variable = model.module
        for part in name.split("."):
            variable = getattr(variable, part)
        packed = variable.get_value()
        assert isinstance(packed, NF4Array)
        stack = np.array(dequantize_nf4(packed, jnp.float32))
        for layer, hf_name in enumerate(spec.hf_names()):
            parameters[hf_name].data = torch.tensor(stack[layer])


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(make_model: Any) -> None:
    directory, reference = make_model()
    truth = torch_logits(reference, tokens())
    theirs = np.linalg.norm(torch_logits(reference.to(torch.bfloat16), tokens()) - truth)
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="bfloat16", load_in_4bit=False, progress=False)
    ours = np.linalg.norm(np.asarray(model(tokens())) - truth)
    assert 0 < ours < 1.2 * theirs
    assert theirs < 0.05 * np.linalg.norm(truth)


def test_packed_documents_are_computed_as_if_alone(make_model: Any) -> None:
    directory, reference = make_model(rope_parameters=ROPES["llama3"])
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="float32", load_in_4bit=False, progress=False)
    ids = tokens(1, 60)
    segments = np.repeat([1, 2, 3, 0], [20, 13, 20, 7])[None].astype(np.int32)
    packed = np.asarray(model(ids, segment_ids=segments))
    for segment in (1, 2, 3):
        where = segments[0] == segment
        assert relative_error(packed[:, where], torch_logits(reference, ids[:, where])) < 1e-4
    assert np.isfinite(packed).all()


def test_given_positions_are_used(make_model: Any) -> None:
    directory, reference = make_model()
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="float32", load_in_4bit=False, progress=False)
    ids = tokens(2, 24)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32) + 17, ids.shape)
    ours = model(ids, positions=jnp.asarray(positions))
    theirs = torch_logits(reference, ids, position_ids=torch.tensor(positions, dtype=torch.long))
    assert relative_error(ours, theirs) < 1e-4


def test_float16_runs(make_model: Any) -> None:
    directory, reference = make_model()
    model, _ = FastLanguageModel.from_pretrained(directory, dtype="float16", load_in_4bit=False, progress=False)
    assert relative_error(model(tokens()), torch_logits(reference, tokens())) < 2e-2
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(model.module.layers.self_attn.q_proj.weight))
