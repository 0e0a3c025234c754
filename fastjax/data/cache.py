"""Tokenised data sets kept on disk, so that a second run on the same data, and other processes of a run, start at once.

What is read back is mapped into memory: a process that lays out some of the rows reads the tokens of these and no others.

A file's name is a digest of all that its content follows from: the records, the tokenizer, the settings, and how this
package tokenises. A data set without a fingerprint, such as a list, is not kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastjax.data.examples import Examples, Report, Summary
from fastjax.data.options import DataOptions
from fastjax.weights.safetensors_file import TensorInfo, read_header

VERSION = 2  # raised whenever the same input makes other tokens than before, or files are laid out otherwise


def user_cache() -> Path:
    """Where tokenised data sets are kept unless a caller says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastjax" / "tokens"


def cached_examples(
    directory: Path | None,
    dataset: Any,
    tokenizer: Any,
    max_length: int,
    options: DataOptions,
    tokenize: Callable[[], Examples],
) -> Examples:
    """What `tokenize` returns, from the cache where it is there."""
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if directory is None or fingerprint is None or backend is None:
        return tokenize()
    settings = [
        VERSION,
        getattr(dataset, "where", str)(0),  # errors and reports name the source
        fingerprint,
        backend.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        max_length,
        dataclasses.asdict(options),
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = directory / f"{digest[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # absent or damaged: made anew
        return read_examples(path)
    examples = tokenize()
    with contextlib.suppress(OSError, SafetensorError):  # a cache that cannot be written is none
        write_examples(path, examples)
    return examples


def read_examples(path: Path) -> Examples:
    """What `write_examples` wrote."""
    with safe_open(path, "numpy") as file:  # checks that the file is whole
        metadata, starts = file.metadata(), file.get_tensor("starts")
    report = json.loads(metadata["report"])
    report["dropped"] = tuple(report["dropped"])
    header = read_header(path)
    tokens, trained = (_mapped(header[name], dtype) for name, dtype in (("tokens", np.int32), ("trained", np.bool_)))
    return Examples(tokens, trained, starts, Report(**report), Summary(*json.loads(metadata["summary"])))


def _mapped(tensor: TensorInfo, dtype: type) -> np.ndarray:
    if not tensor.nbytes:  # which cannot be mapped
        return np.zeros(tensor.shape, dtype)
    return np.memmap(tensor.path, dtype, mode="r", offset=tensor.offset, shape=tensor.shape)


def write_examples(path: Path, examples: Examples) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": examples.tokens, "trained": examples.trained, "starts": examples.starts}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        about = {"report": dataclasses.asdict(examples.report), "summary": examples.summary}
        save_file(arrays, temporary, {name: json.dumps(value) for name, value in about.items()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
