"""A Hugging Face checkpoint directory: found, opened, and checked before any weight is read.

It holds `config.json` and either `model.safetensors` or `model.safetensors.index.json` with the files that names.
Where both are there the single file wins, as in transformers. What the files' own headers hold is taken as the truth;
an index only names files, and must agree with them.

An index comes from whoever made the checkpoint, so a name in it must stay within the directory as written: no absolute
path, no "..". Symbolic links are followed all the same, because the hub's cache is made of them (a snapshot's files
link to ../../blobs/...): a link is made by this machine's user, a name by a stranger.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fastjax.weights.errors import (
    CheckpointNotFoundError,
    DuplicateTensorError,
    IndexFileError,
    JsonFileError,
    OutsidePathError,
    PickleCheckpointError,
    duplicates,
    listing,
)
from fastjax.weights.safetensors_file import TensorInfo, read_header

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt")
HUB_FILES_LEFT_OUT = ("original/*", "consolidated*")  # the same weights again, in their makers' own layout
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def resolve_checkpoint(model_name: str | Path) -> Path:
    """The directory of a model: `model_name` itself if it is one, else the hub's files of that id, downloaded once."""
    name = str(model_name)
    path = Path(os.path.expanduser(name))  # unlike Path's method, leaves ~ of an unknown user alone
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise CheckpointNotFoundError(f"{path} is a file; give the directory that holds the checkpoint.")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointNotFoundError(
            f"{name!r} is neither a directory here nor a hub id such as 'organisation/model'; check the spelling."
        )
    from huggingface_hub import snapshot_download  # a second to import, and of no use to local checkpoints
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*HUB_FILES], ignore_patterns=[*HUB_FILES_LEFT_OUT]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointNotFoundError(
            f"{name!r} is no directory here, and the hub did not give it ({reason}); check the name, the connection "
            "and, for a gated model, that you are logged in."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of a checkpoint's config.json."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise CheckpointNotFoundError(f"{directory} has no {CONFIG_NAME}; give the directory of a whole HF checkpoint.")
    return _read_json_object(path)


def _read_json_object(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := duplicates(name for name, _ in pairs):
            raise DuplicateTensorError(f"{path} has {listing(twice)} twice in one object; restore the file.")
        return dict(pairs)

    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except DuplicateTensorError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonFileError(f"{path} is not valid JSON ({error}); restore the file.") from error
    if not isinstance(value, dict):
        raise JsonFileError(f"{path} is a JSON {type(value).__name__}, not an object; restore the file.")
    return value


def find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by its HF name; only headers are read."""
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"{directory} is not a directory; give one that holds a HF checkpoint.")
    if (directory / SINGLE_NAME).exists():
        return read_header(directory / SINGLE_NAME)
    if (directory / INDEX_NAME).exists():
        return _indexed_tensors(directory)
    raise _no_weights(directory)


def _no_weights(directory: Path) -> Exception:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return CheckpointNotFoundError(
            f"{directory} holds {listing(shards)} but neither {SINGLE_NAME} nor {INDEX_NAME}; add the missing index."
        )
    if pickles:
        return PickleCheckpointError(
            f"{directory} holds its weights only as pickles ({listing(pickles)}), which can run code when loaded and "
            "never are; convert it with transformers' from_pretrained and save_pretrained, which writes safetensors."
        )
    return CheckpointNotFoundError(f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; is it a HF checkpoint?")


def _indexed_tensors(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_NAME
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise IndexFileError(f"{index} has no weight_map of tensor names to file names; restore the file.")
    files = {file: _named_file(index, file) for file in sorted(set(weight_map.values()))}
    headers = {file: read_header(path) for file, path in files.items()}
    tensors = _merge_headers(headers.values())
    for name, file in weight_map.items():
        if name not in headers[file]:
            held = f"it is in {tensors[name].path.name}" if name in tensors else "no file has it"
            raise IndexFileError(
                f"{index} places tensor {name} in {file}, where it is not ({held}); restore the files."
            )
    return tensors


def _named_file(index: Path, file: str) -> Path:
    """The file an index names, which must lie within the index's directory (see the module's docstring)."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    if posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts):
        raise OutsidePathError(
            f"{index} names {file!r}, outside its own directory; an index may only name files in it."
        )
    if posix.suffix != ".safetensors":
        raise PickleCheckpointError(
            f"{index} names {file!r}, which is not a .safetensors file; no other kind is loaded."
        )
    path = index.parent / posix
    if not path.is_file():
        raise CheckpointNotFoundError(f"{index} names {file!r}, which is not there; download the missing file.")
    return path


def _merge_headers(headers: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                raise DuplicateTensorError(
                    f"tensor {name} is in both {tensors[name].path} and {info.path}; remove one of the two."
                )
            tensors[name] = info
    return tensors
