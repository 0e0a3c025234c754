"""Checkpoints in: exact values, everything that can be wrong with them, parity with transformers and bitsandbytes."""

import re

import bitsandbytes
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import LlamaConfig as TorchLlamaConfig

from fastjax.models import LlamaConfig, param_specs
from fastjax.weights import errors, transfer
from fastjax.weights.bnb import nf4_to_bnb
from fastjax.weights.checkpoint import read_config
from fastjax.weights.load import load_weights
from fastjax.weights.placement import allocate, make_target, store
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4

Q_PROJ = "layers.self_attn.q_proj.weight"
LEAVES = ("codes", "scales", "nested_scales", "offset")


def load(directory, config, *, load_in_4bit=False, dtype="bfloat16", **options):
    return load_weights(
        directory, param_specs(config), load_in_4bit=load_in_4bit, dtype=dtype, progress=False, **options
    )


def stacked(tensors, spec):
    arrays = [tensors[name] for name in spec.hf_names()]
    return arrays[0] if spec.layers is None else np.stack(arrays)


def same(ours, array: np.ndarray) -> bool:
    ours = np.asarray(ours)
    return ours.dtype == array.dtype and ours.shape == array.shape and ours.tobytes() == array.tobytes()


def same_packed(ours: NF4Array, expected: NF4Array) -> bool:
    return all(same(getattr(ours, leaf), np.asarray(getattr(expected, leaf))) for leaf in LEAVES)


def in_two(tensors):
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[:7], names[7:])]


# Values.


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_are_those_stored(config, tensors, write, stored, dtype):
    tensors = {name: array.astype(stored) for name, array in tensors.items()}
    weights = load(write(*in_two(tensors)), config, dtype=dtype)
    specs = param_specs(config)
    assert list(weights) == list(specs)
    assert all(same(weights[key], stacked(tensors, spec).astype(dtype)) for key, spec in specs.items())


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float32])
def test_quantised_like_each_layer_by_itself(config, tensors, write, stored):
    rng = np.random.default_rng(1)
    tensors = {name: (array + rng.normal(0, 1e-3, array.shape)).astype(stored) for name, array in tensors.items()}
    weights = load(write(tensors), config, load_in_4bit=True)
    for key, spec in param_specs(config).items():
        cast = jnp.asarray(stacked(tensors, spec).astype(ml_dtypes.bfloat16))
        if spec.quantize:
            assert isinstance(weights[key], NF4Array)
            assert same_packed(weights[key], quantize_nf4(cast)), key
        else:
            assert same(weights[key], np.asarray(cast)), key


def test_tensors_larger_than_a_piece(config, tensors, write, monkeypatch):
    directory = write(tensors)
    whole = load(directory, config, load_in_4bit=True)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 5000)  # of 256-byte rows: 19 at a time, which divides nothing here
    pieces = load(directory, config, load_in_4bit=True)
    assert all(same(a, np.asarray(b)) for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True))


def test_a_stack_is_updated_in_place(config):
    spec = param_specs(config)[Q_PROJ]
    target = make_target(spec, quantize=True, dtype="bfloat16", mesh=None)
    value = jnp.ones(spec.shape, jnp.bfloat16)
    stack = allocate(target, value)
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(stack)]
    updated, _ = store(target, stack, value, 1)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(updated)] == where
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stack))


def test_progress_bar_counts_every_byte(config, tensors, write, capsys):
    load_weights(write(tensors), param_specs(config), load_in_4bit=True, dtype="bfloat16", progress=True)
    total = sum(array.nbytes for array in tensors.values())
    shown = capsys.readouterr().err  # the bar between is as wide as the terminal
    assert "100%|█" in shown
    assert f"█| {total / 1000:.3g}k/{total / 1000:.3g}k" in shown
    load_weights(write(tensors), param_specs(config), load_in_4bit=True, dtype="bfloat16", progress=False)
    assert not capsys.readouterr().err


def test_dtype_of_no_use(config, tensors, write):
    with pytest.raises(ValueError, match="dtype='int32' is not one that weights can have; choose from bfloat16"):
        load(write(tensors), config, dtype="int32")


# Names, shapes, dtypes.


def test_missing(config, tensors, write):
    for name in [name for name in tensors if "k_proj.weight" in name or "down_proj" in name]:
        del tensors[name]
    expected = r"lacks 4 of the \d+ tensors .*: model\.layers\.0\.self_attn\.k_proj\.weight, .* and 1 more"
    with pytest.raises(errors.MissingTensorsError, match=expected):
        load(write(tensors), config)


def test_surplus(config, tensors, write):
    tensors["model.layers.0.self_attn.q_norm.weight"] = tensors["model.norm.weight"]
    with pytest.raises(errors.SurplusTensorsError, match=r"holds 1 tensors .*: model\.layers\.0\.self_attn\.q_norm"):
        load(write(tensors), config)


def test_harmless_surplus(config, tensors, write):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(16, np.float32)
    load(write(tensors), config)


def tied(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig.from_hf({**config.to_hf(), "tie_word_embeddings": True})


def test_tied_checkpoint_that_stores_the_head_too(config, tensors, write, monkeypatch):
    monkeypatch.setattr("fastjax.weights.plan.COMPARED_BYTES", 1000)  # so that it is compared in several steps
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "lm_head.weight" not in load(write(tensors), tied(config))
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(
        errors.SurplusTensorsError, match=r"differs from model\.embed_tokens\.weight.*tie_word_embeddings"
    ):
        load(write(tensors), tied(config))


def test_shape(config, tensors, write):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(errors.TensorShapeError, match=rf"tensor {re.escape(name)} .* \[128, 192\].* \[192, 128\]"):
        load(write(tensors), config)


def test_dtype(config, tensors, write):
    tensors["model.norm.weight"] = np.zeros(128, np.float64)
    with pytest.raises(errors.TensorDtypeError, match=r"tensor model\.norm\.weight .* has dtype F64"):
        load(write(tensors), config)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_not_finite(config, tensors, write, name, value, load_in_4bit):
    tensors[name].reshape(-1)[-1] = value
    with pytest.raises(errors.NonFiniteWeightError, match=rf"tensor {re.escape(name)} in .* holds NaN or Inf"):
        load(write(tensors), config, load_in_4bit=load_in_4bit)


def test_too_large_for_the_dtype(config, tensors, write):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][3, 5] = 1e6
    with pytest.raises(errors.NonFiniteWeightError, match=rf"{re.escape(name)} .*too large for float16; .*bfloat16"):
        load(write(tensors), config, dtype="float16")


# Checkpoints that are quantised already.


def packed_tensors(tensors, config, *, keep_plain=(), double_quant=True):
    result = dict(tensors)
    for spec in param_specs(config).values():
        for name in spec.hf_names():
            if spec.quantize and name not in keep_plain:
                packed = quantize_nf4(jnp.asarray(tensors[name]), double_quant=double_quant)
                result |= nf4_to_bnb(packed, "bfloat16", name)
    return result


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_stays_packed(config, tensors, write, double_quant):
    weights = load(write(packed_tensors(tensors, config, double_quant=double_quant)), config, load_in_4bit=True)
    expected = quantize_nf4(jnp.asarray(stacked(tensors, param_specs(config)[Q_PROJ])), double_quant=double_quant)
    assert isinstance(weights[Q_PROJ], NF4Array)
    assert jax.tree.structure(weights[Q_PROJ]) == jax.tree.structure(expected)
    assert all(map(same, jax.tree.leaves(weights[Q_PROJ]), map(np.asarray, jax.tree.leaves(expected))))


def test_packed_is_dequantised_where_16_bits_are_asked_for(config, tensors, write):
    weights = load(write(packed_tensors(tensors, config)), config, load_in_4bit=False)
    expected = dequantize_nf4(quantize_nf4(jnp.asarray(stacked(tensors, param_specs(config)[Q_PROJ]))), jnp.bfloat16)
    assert same(weights[Q_PROJ], np.asarray(expected))


def test_what_a_packed_checkpoint_leaves_plain_stays_plain(config, tensors, write):
    q_projs = param_specs(config)[Q_PROJ].hf_names()
    weights = load(write(packed_tensors(tensors, config, keep_plain=q_projs)), config, load_in_4bit=True)
    assert same(weights[Q_PROJ], stacked(tensors, param_specs(config)[Q_PROJ]))
    assert isinstance(weights["layers.self_attn.k_proj.weight"], NF4Array)


def test_layers_packed_and_plain(config, tensors, write):
    name = param_specs(config)[Q_PROJ].hf_names()[1]
    directory = write(packed_tensors(tensors, config, keep_plain=[name]))
    with pytest.raises(
        errors.QuantizedCheckpointError, match=rf"{re.escape(name)} is stored plain.*load_in_4bit=False"
    ):
        load(directory, config, load_in_4bit=True)
    assert same(load(directory, config)[Q_PROJ][1], tensors[name])


def test_layers_packed_differently(config, tensors, write):
    name = param_specs(config)[Q_PROJ].hf_names()[1]
    mixed = packed_tensors(tensors, config)
    mixed = {key: value for key, value in mixed.items() if not key.startswith(name)}
    mixed |= nf4_to_bnb(quantize_nf4(jnp.asarray(tensors[name]), double_quant=False), "bfloat16", name)
    with pytest.raises(errors.QuantizedCheckpointError, match=rf"{re.escape(name)} .*is not packed as other layers'"):
        load(write(mixed), config, load_in_4bit=True)


def test_packed_shape(config, tensors, write):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(errors.TensorShapeError, match=rf"{re.escape(name)} .* \[128, 192\].* \[192, 128\]"):
        load(write(packed_tensors(tensors, config)), config, load_in_4bit=True)


@pytest.mark.parametrize("suffix", ["qweight", "SCB", "weight_scale_inv"])
def test_quantised_by_another_method(config, tensors, write, suffix):
    tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = np.zeros(4, np.float32)
    with pytest.raises(errors.QuantizedCheckpointError, match=rf"not supported \(it holds .*{suffix}\)"):
        load(write(tensors), config, load_in_4bit=True)


# Parity.


def torch_model(directory, config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TorchLlamaConfig.from_dict(config.to_hf())).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_()
    model.save_pretrained(directory, max_shard_size="100KB")
    return model


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_tied", [True, False])
def test_what_transformers_saves(tmp_path, config, dtype, is_tied):
    config = tied(config) if is_tied else config
    model = torch_model(tmp_path, config, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    state = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    name = str(dtype).removeprefix("torch.")
    weights = load(tmp_path, LlamaConfig.from_hf(read_config(tmp_path)), dtype=name)
    specs = param_specs(config)
    assert weights.keys() == specs.keys()
    assert all(same(weights[key], stacked(state, spec)) for key, spec in specs.items())


def dequantised(state: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module], name: str) -> np.ndarray:
    weight = modules[name.removesuffix(".weight")].weight
    return to_numpy(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))


@pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes about themselves
def test_quantised_as_transformers_does(tmp_path, config):
    torch_model(tmp_path / "f32", config, torch.float32)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": quantization, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16, **options)
    model.save_pretrained(tmp_path / "packed")
    modules = dict(model.named_modules())
    ours = load(tmp_path / "f32", config, load_in_4bit=True, dtype="bfloat16")
    theirs = load(tmp_path / "packed", config, load_in_4bit=True, dtype="bfloat16")
    for key, spec in param_specs(config).items():
        for layer, name in enumerate(spec.hf_names() if spec.quantize else []):
            assert same(ours[key].codes[layer], np.asarray(theirs[key].codes[layer])), name
            values = dequantize_nf4(jax.tree.map(lambda leaf, i=layer: leaf[i], theirs[key]), jnp.bfloat16)
            assert same(values, dequantised(model.state_dict(), modules, name)), name
