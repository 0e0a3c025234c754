"""Tokenised data sets kept on disk, so that a second run on the same data starts at once.

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

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastjax.data.examples import Examples, Report
from fastjax.data.options import DataOptions

VERSION = 1  # raised whenever the same input makes other tokens than before


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
        return read(path)
    examples = tokenize()
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        write(path, examples)
    return examples


def read(path: Path) -> Examples:
    with safe_open(path, "numpy") as file:
        report = json.loads(file.metadata()["report"])
        report["dropped"] = tuple(report["dropped"])
        tokens, trained, starts = map(file.get_tensor, ("tokens", "trained", "starts"))
        return Examples(tokens, trained, starts, Report(**report))


def write(path: Path, examples: Examples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": examples.tokens, "trained": examples.trained, "starts": examples.starts}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, {"report": json.dumps(dataclasses.asdict(examples.report))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
