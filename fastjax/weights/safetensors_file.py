"""The safetensors format: headers read and checked, rows of a tensor read, headers written.

A file is an unsigned 64-bit little-endian length n, n bytes of JSON, then the tensors' bytes. The JSON maps a name to
{"dtype", "shape", "data_offsets": [begin, end]}, offsets counting from the end of the JSON; "__metadata__" maps strings
to strings. Tensors cover the rest of the file without gap or overlap.

Why not the `safetensors` package, against which the tests check this module both ways: for numpy its `get_slice` reads
the whole tensor and then copies the slice out (so that an eighth of an embedding costs all of it, and all of it costs
twice), into memory that is not aligned for XLA to take over without yet another copy; its writer wants every tensor of
a file in memory at once; and it reports every kind of damage by the same exception.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastjax.weights.errors import (
    CorruptHeaderError,
    DuplicateTensorError,
    TensorDtypeError,
    TruncatedFileError,
    duplicates,
    listing,
)

BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
NUMPY_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
}
FORMAT_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
LARGEST_HEADER = 100_000_000  # the reference implementation's limit
ALIGNMENT = 64  # XLA on the CPU takes over a host buffer aligned to this instead of copying it
AGAIN = "download or export the file again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """Its dtype in memory; an error where fastjax has no use for it."""
        if self.dtype not in NUMPY_DTYPES:
            expected = ", ".join(NUMPY_DTYPES)
            raise TensorDtypeError(
                f"tensor {self.name} in {self.path} has dtype {self.dtype}, which cannot be loaded; convert it to "
                f"one of {expected}."
            )
        return NUMPY_DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, after checking that the header and the file's size agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TruncatedFileError(f"{path} holds {size} bytes, too few for a safetensors header; {AGAIN}.")
        length = int.from_bytes(prefix, "little")
        if length > LARGEST_HEADER:
            raise CorruptHeaderError(
                f"{path} states a header of {length} bytes, more than the format's {LARGEST_HEADER}; it is not a "
                f"safetensors file or is damaged: {AGAIN}."
            )
        if 8 + length > size:
            raise TruncatedFileError(f"{path} holds {size} bytes, less than its header of {length}; {AGAIN}.")
        entries = _parse_json(path, file.read(length))
    entries.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_coverage(path, tensors.values(), 8 + length, size)
    return tensors


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := duplicates(name for name, _ in pairs):
            raise DuplicateTensorError(f"the header of {path} lists {listing(twice)} twice; {AGAIN}.")
        return dict(pairs)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except DuplicateTensorError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptHeaderError(f"the header of {path} is not valid JSON ({error}); {AGAIN}.") from error
    if not isinstance(entries, dict):
        raise CorruptHeaderError(f"the header of {path} is a JSON {type(entries).__name__}, not an object; {AGAIN}.")
    return entries


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CorruptHeaderError(
            f"the header of {path} describes tensor {name} as {str(entry)[:200]}, which is not a dtype, a shape and "
            f"two offsets; {AGAIN}."
        )
    if dtype not in BITS:
        raise TensorDtypeError(
            f"tensor {name} in {path} has the unknown dtype {dtype!r}; convert it to one of {', '.join(BITS)}."
        )
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise CorruptHeaderError(
            f"the header of {path} gives tensor {name} {end - begin} bytes, where {dtype} {shape} takes {bits // 8}; "
            f"{AGAIN}."
        )
    return TensorInfo(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, tensors: Any, data_start: int, size: int) -> None:
    """The tensors' ranges, in order, must tile the file from the end of the header to its last byte."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap before it"
            raise CorruptHeaderError(f"the header of {path} places tensor {tensor.name} where it {fault}; {AGAIN}.")
        position += tensor.nbytes
    if position > size:
        raise TruncatedFileError(f"{path} holds {size} bytes, where its header describes {position}; {AGAIN}.")
    if position < size:
        raise CorruptHeaderError(f"{path} holds {size} bytes, where its header describes only {position}; {AGAIN}.")


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor's first axis: just their bytes, into an aligned buffer that nothing else holds."""
    dtype = info.numpy_dtype
    rows = info.shape[0] if info.shape else 1
    stop = rows if stop is None else stop
    row_bytes = info.nbytes // rows if rows else 0
    buffer = _aligned_buffer((stop - start) * row_bytes)
    descriptor = os.open(info.path, os.O_RDONLY)
    try:
        _fill(descriptor, buffer, info, info.offset + start * row_bytes)
    finally:
        os.close(descriptor)
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    return buffer.view(dtype).reshape(shape)


def _aligned_buffer(nbytes: int) -> np.ndarray:
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -buffer.ctypes.data % ALIGNMENT
    return buffer[skip : skip + nbytes]


def _fill(descriptor: int, buffer: np.ndarray, info: TensorInfo, offset: int) -> None:
    view = memoryview(buffer)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise TruncatedFileError(f"{info.path} ended within tensor {info.name} while it was being read; {AGAIN}.")
        view, offset = view[count:], offset + count


def make_header(tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The length and JSON that come before tensors written one after the other in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in FORMAT_NAMES:
            known = ", ".join(map(str, FORMAT_NAMES))
            raise TensorDtypeError(
                f"tensor {name} has dtype {dtype}, which is not written; convert it to one of {known}."
            )
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned, as the reference implementation does
    return len(text).to_bytes(8, "little") + text
