"""Full models out: what transformers reads back, how files are split, and that nothing is ever half-written."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from fastjax.errors import UserError
from fastjax.models import LlamaConfig, init_weights, param_specs
from fastjax.weights.load import load_weights
from fastjax.weights.safetensors_file import read_header
from fastjax.weights.save import ExportTensor, export_tensors, plan_shards, save_weights
from fastjax.weights.staging import staged_directory
from pallas_kernels import dequantize_nf4, quantize_nf4

INDEX = "model.safetensors.index.json"


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def export(name: str, *shape: int, dtype=np.float32) -> ExportTensor:
    return ExportTensor.of(name, np.arange(np.prod(shape)).reshape(shape).astype(dtype))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def weights(request, config):
    config = LlamaConfig.from_hf({**config.to_hf(), "tie_word_embeddings": request.param})
    weights = init_weights(config, jax.random.key(0), jnp.bfloat16)
    for key, weight in weights.items():  # norms and biases too
        if weight.ndim < 3:
            weights[key] = jax.random.normal(jax.random.key(1), weight.shape, weight.dtype)
    return config, weights


def torch_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_bytes", [100_000, 10**9])
def test_transformers_loads_what_is_saved(tmp_path, weights, dtype, max_shard_bytes):
    config, arrays = weights
    specs = param_specs(config)
    save_weights(tmp_path, export_tensors(arrays, specs, dtype=dtype), max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes < 10**9)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for key, spec in specs.items():
        for layer, name in enumerate(spec.hf_names()):
            ours = arrays[key] if spec.layers is None else arrays[key][layer]
            assert np.array_equal(torch_array(state[name]), np.asarray(ours.astype(dtype))), name
    ours = load_weights(tmp_path, specs, load_in_4bit=False, dtype=dtype, progress=False)
    assert all(np.array_equal(ours[key], arrays[key].astype(dtype)) for key in specs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_packed_weights_are_dequantised(tmp_path, config, dtype):
    specs = param_specs(config)
    weights = init_weights(config, jax.random.key(0), jnp.bfloat16)
    packed = {key: quantize_nf4(weights[key]) if spec.quantize else weights[key] for key, spec in specs.items()}
    save_weights(tmp_path, export_tensors(packed, specs, dtype=dtype))
    loaded = load_weights(tmp_path, specs, load_in_4bit=False, dtype=dtype, progress=False)
    for key, spec in specs.items():
        expected = dequantize_nf4(packed[key], dtype) if spec.quantize else weights[key].astype(dtype)
        assert np.array_equal(loaded[key], expected), key


def test_export_takes_exactly_what_is_declared(config):
    specs = param_specs(config)
    weights = init_weights(config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"differ in norm\.weight"):
        list(export_tensors({k: v for k, v in weights.items() if k != "norm.weight"}, specs))
    with pytest.raises(ValueError, match=r"weight norm\.weight has shape \(3,\), where \(128,\) is declared"):
        list(export_tensors(weights | {"norm.weight": jnp.zeros(3)}, specs))


def test_tensors_are_made_one_at_a_time(tmp_path):
    alive = []

    def make(number: int) -> np.ndarray:
        alive.append(number)
        written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
        assert written >= 100_000 * number  # the ones before are in the file already
        return np.full((100, 250), number, np.float32)

    tensors = [ExportTensor(f"t{i}", (100, 250), np.dtype(np.float32), lambda i=i: make(i)) for i in range(5)]
    save_weights(tmp_path / "out", tensors)
    assert alive == list(range(5))


def test_split_into_files(tmp_path):
    tensors = [export("a", 10), export("b", 10), export("large", 100), export("c", 20), export("d", 5)]
    assert [[t.name for t in shard] for shard in plan_shards(tensors, 100)] == [["a", "b"], ["large"], ["c", "d"]]
    save_weights(tmp_path, tensors, max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    for tensor in tensors:
        assert tensor.name in read_header(tmp_path / index["weight_map"][tensor.name])
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        plan_shards(tensors, 0)


def test_nothing_to_save_or_twice_the_same(tmp_path):
    with pytest.raises(ValueError, match="no tensors to save"):
        save_weights(tmp_path / "out", [])
    with pytest.raises(ValueError, match="tensors a are to be saved more than once"):
        save_weights(tmp_path / "out", [export("a", 2), export("b", 2), export("a", 2)])
    assert not (tmp_path / "out").exists()


def test_tensor_is_not_as_declared(tmp_path):
    wrong = ExportTensor("a", (2, 3), np.dtype(np.float32), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"tensor a came as float32 \[3, 2\], where float32 \[2, 3\] was declared"):
        save_weights(tmp_path / "out", [wrong])
    assert files(tmp_path) == []


def fail() -> np.ndarray:
    raise KeyboardInterrupt


def test_interrupted_save_leaves_nothing(tmp_path):
    tensors = [export("a", 10), ExportTensor("b", (10,), np.dtype(np.float32), fail)]
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path / "out", tensors)
    assert files(tmp_path) == []


def test_interrupted_save_leaves_an_earlier_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_weights(tmp_path, [export("a", 10)])
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, [export("x", 10), ExportTensor("b", (10,), np.dtype(np.float32), fail)])
    assert files(tmp_path) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_earlier_weights_do_not_outlive_a_save(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    others = ["adapter_model.safetensors", "config.json"]
    save_weights(tmp_path, [export("a", 10), export("b", 10), export("c", 10)], max_shard_bytes=40)
    assert files(tmp_path) == sorted([*others, INDEX, *[f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]])
    save_weights(tmp_path, [export("a", 10)])
    assert files(tmp_path) == sorted([*others, "model.safetensors"])
    save_weights(tmp_path, [export("a", 10), export("b", 10)], max_shard_bytes=40)
    assert files(tmp_path) == sorted([*others, INDEX, *[f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]])


def test_interruption_while_files_are_moved_leaves_no_loadable_mixture(tmp_path, monkeypatch):
    """The moment that no rename covers: the old index is gone before a new file comes, the new one comes last."""
    names = ["a", "b"]
    save_weights(tmp_path, [export(name, 10) for name in names], max_shard_bytes=40)
    moves = []
    replace = Path.replace

    def interrupt(path: Path, target: Path) -> Path:
        moves.append(path.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, [export(name, 10) for name in names], max_shard_bytes=40)
    assert INDEX not in files(tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


def test_staged_directory_has_usual_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with staged_directory(tmp_path / "deep" / "out") as staging:
        (staging / "x").touch(0o600)  # as safetensors leaves its files
        assert not (tmp_path / "deep" / "out").exists()
    assert files(tmp_path / "deep") == ["out"]
    (tmp_path / "plain" / "x").touch()
    for one in (".", "x"):
        assert (tmp_path / "deep" / "out" / one).stat().st_mode == (tmp_path / "plain" / one).stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_told_by_the_directory_that_was_to_be(tmp_path, error):
    with (
        pytest.raises(UserError, match=r"out cannot be written \(No space left on device\)"),
        staged_directory(tmp_path / "out"),
    ):
        raise error
    assert not files(tmp_path)


def test_staged_directory_over_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out, which is a file"), staged_directory(tmp_path / "out"):
        pass
