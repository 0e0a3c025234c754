"""Finding a checkpoint, and what an index may not say."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

from fastjax.errors import UserError
from fastjax.weights import errors
from fastjax.weights.checkpoint import HUB_FILES, find_tensors, read_config, resolve_checkpoint

INDEX = "model.safetensors.index.json"


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def halves(tensors):
    names = sorted(tensors)
    return [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]


def test_single_and_sharded(tensors, write):
    directory = write(*halves(tensors))
    sharded = find_tensors(directory)
    assert sharded.keys() == tensors.keys()
    assert {info.path.name for info in sharded.values()} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {n: i.shape for n, i in sharded.items()} == {n: t.shape for n, t in tensors.items()}
    write(tensors)
    single = find_tensors(directory)  # both are there now: the single file wins, as in transformers
    assert single.keys() == tensors.keys()
    assert {info.path.name for info in single.values()} == {"model.safetensors"}


def test_links_out_of_the_directory_are_followed(tensors, write, tmp_path):
    write(*halves(tensors))
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for number, path in enumerate([*tmp_path.glob("model-*"), tmp_path / INDEX]):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../blobs/{number}")
    assert find_tensors(snapshot).keys() == tensors.keys()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"],
)
def test_index_names_a_file_outside(tensors, tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(tensors, tmp_path / "x.safetensors")  # it must not matter that the file is there
    write_index(directory, dict.fromkeys(tensors, name))
    with pytest.raises(errors.OutsidePathError, match="outside its own directory"):
        find_tensors(directory)


def test_index_names_a_pickle(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(errors.PickleCheckpointError, match=r"pytorch_model\.bin.*not a \.safetensors file"):
        find_tensors(tmp_path)


def test_index_names_a_missing_file(tensors, write):
    directory = write(*halves(tensors))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        errors.CheckpointNotFoundError, match=r"'model-00002-of-00002\.safetensors', which is not there"
    ):
        find_tensors(directory)


def test_index_misplaces_a_tensor(tensors, write):
    directory = write(*halves(tensors))
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    name = next(name for name, file in index.items() if file == first)
    write_index(directory, index | {name: second})
    with pytest.raises(errors.IndexFileError, match=rf"places tensor {name} in {second}, .*it is in {first}"):
        find_tensors(directory)
    write_index(directory, index | {"unheard.of": second})
    with pytest.raises(errors.IndexFileError, match=r"places tensor unheard\.of .*no file has it"):
        find_tensors(directory)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_without_a_map(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(errors.IndexFileError, match="no weight_map"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_index_is_not_json(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(errors.JsonFileError, match=r"index\.json is .*JSON"):
        find_tensors(tmp_path)


def test_index_lists_a_name_twice(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(errors.DuplicateTensorError, match="has a twice"):
        find_tensors(tmp_path)


def test_tensor_in_two_files(tensors, write):
    first, second = halves(tensors)
    directory = write(first, second | {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(
        errors.DuplicateTensorError, match=r"tensor model\.norm\.weight is in both .*00001.* and .*00002"
    ):
        find_tensors(directory)


def test_pickles_only(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(errors.PickleCheckpointError, match=r"only as pickles \(pytorch_model-00001.*convert"):
        find_tensors(tmp_path)


def test_files_without_an_index(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(errors.CheckpointNotFoundError, match="missing index"):
        find_tensors(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(errors.CheckpointNotFoundError, match=r"neither model\.safetensors nor"):
        find_tensors(tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError, match="not a directory"):
        find_tensors(tmp_path / "nowhere")


def test_config(tmp_path):
    with pytest.raises(errors.CheckpointNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == {"model_type": "llama"}
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(errors.JsonFileError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


def test_resolve_directory(tmp_path, monkeypatch):
    assert resolve_checkpoint(tmp_path) == tmp_path
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("organisation/model") == Path("organisation/model")  # before any look at the hub


def test_resolve_hub_id(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked[name] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("organisation/some-model_1.0") == tmp_path
    (options,) = asked.values()
    assert asked.keys() == {"organisation/some-model_1.0"}
    assert set(options["allow_patterns"]) == set(HUB_FILES)
    assert "*.bin" not in options["allow_patterns"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("not in the\ncache"), OSError("not in the cache")])
def test_resolve_hub_id_that_fails(monkeypatch, error):
    def snapshot_download(name: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(errors.CheckpointNotFoundError, match=r"'organisation/model' is no directory.*not in the cache"):
        resolve_checkpoint("organisation/model")


@pytest.mark.parametrize(
    "name",
    [
        "./models/none",
        "/no/such/place",
        "a/b/c",
        "",
        "~/nothing-here",
        "~nobody-such/x",
        "two words",
        "../no-such-place",
    ],
)
def test_resolve_neither(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # must not be called
    with pytest.raises(errors.CheckpointNotFoundError, match="neither a directory here nor a hub id") as caught:
        resolve_checkpoint(name)
    assert isinstance(caught.value, UserError | FileNotFoundError)


def test_resolve_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(errors.CheckpointNotFoundError, match="is a file"):
        resolve_checkpoint(path)
