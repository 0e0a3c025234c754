"""The format against the reference implementation, and every kind of damage to a file."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastjax.weights import safetensors_file
from fastjax.weights.errors import CorruptHeaderError, DuplicateTensorError, TensorDtypeError, TruncatedFileError
from fastjax.weights.safetensors_file import ALIGNMENT, read_header, read_rows
from fastjax.weights.save import ExportTensor, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_raw(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "bf16": rng.standard_normal((7, 5)).astype(ml_dtypes.bfloat16),
        "f16": rng.standard_normal((3, 2, 4)).astype(np.float16),
        "f32": rng.standard_normal(11).astype(np.float32),
        "u8": rng.integers(0, 256, (5, 1)).astype(np.uint8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reads_what_the_reference_writes(path, arrays):
    save_file(arrays, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert infos.keys() == arrays.keys()
    assert all(same(read_rows(infos[name]), arrays[name]) for name in arrays)


def test_reference_reads_what_is_written(path, arrays):
    write_safetensors(path, [ExportTensor.of(name, array) for name, array in arrays.items()], {"format": "pt"})
    loaded = load_file(path)
    assert all(same(loaded[name], arrays[name]) for name in arrays)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(info.offset % info.numpy_dtype.itemsize == 0 for info in read_header(path).values())


def test_rows_alone_are_read(path, arrays, monkeypatch):
    save_file(arrays, path)
    counted = []
    preadv = safetensors_file.os.preadv

    def count(descriptor: int, buffers: list, offset: int) -> int:
        counted.append(preadv(descriptor, buffers, offset))
        return counted[-1]

    monkeypatch.setattr(safetensors_file.os, "preadv", count)
    block = read_rows(read_header(path)["bf16"], 2, 6)
    assert same(block, arrays["bf16"][2:6])
    assert sum(counted) == block.nbytes
    assert block.ctypes.data % ALIGNMENT == 0


def test_short_reads_are_continued(path, arrays, monkeypatch):
    save_file(arrays, path)
    preadv = safetensors_file.os.preadv
    monkeypatch.setattr(safetensors_file.os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    assert same(read_rows(read_header(path)["f16"]), arrays["f16"])


@pytest.mark.parametrize("kept", [0, 5, 12, -1])
def test_truncated(path, arrays, kept):
    save_file(arrays, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(TruncatedFileError, match=r"x\.safetensors holds \d+ bytes.*again"):
        read_header(path)


def test_truncated_while_read(path, arrays):
    save_file(arrays, path)
    infos = read_header(path)
    last = max(infos.values(), key=lambda info: info.offset)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError, match=f"ended within tensor {last.name}"):
        read_rows(last)


def test_header_length_beyond_reason(path):
    write_raw(path, {"a": ENTRY}, length=1 << 60)
    with pytest.raises(CorruptHeaderError, match="1152921504606846976 bytes, more than"):
        read_header(path)


@pytest.mark.parametrize("text", [b"{not json", b"\xff\xfe{}", b"[" * 100_000, b"[1, 2]", b'{"a": NaN'])
def test_header_is_not_a_json_object(path, text):
    write_raw(path, text)
    with pytest.raises(CorruptHeaderError, match=r"header of .*JSON"):
        read_header(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-2, -3]},
        {"shape": [2.0, 3]},
        {"shape": "23"},
        {"shape": None},
        {"shape": [True, 6]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"dtype": ["F32"]},
    ],
)
def test_entry_is_malformed(path, change):
    write_raw(path, {"a": ENTRY | change})
    with pytest.raises(CorruptHeaderError, match="describes tensor a as"):
        read_header(path)


def test_entry_lacks_a_field(path):
    write_raw(path, {"a": {"dtype": "F32", "shape": [2, 3]}})
    with pytest.raises(CorruptHeaderError, match="describes tensor a as"):
        read_header(path)


def test_dtype_unknown(path):
    write_raw(path, {"a": ENTRY | {"dtype": "Q4"}})
    with pytest.raises(TensorDtypeError, match="unknown dtype 'Q4'"):
        read_header(path)


def test_dtype_of_no_use(path):
    save_file({"a": np.zeros((2, 3))}, path)
    with pytest.raises(TensorDtypeError, match=r"tensor a in .* has dtype F64"):
        read_rows(read_header(path)["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F16"}, r"gives tensor a 24 bytes, where F16 \[2, 3\] takes 12"),
        ({"shape": [2, 4]}, r"gives tensor a 24 bytes, where F32 \[2, 4\] takes 32"),
        ({"data_offsets": [24, 0]}, r"gives tensor a -24 bytes, where F32 \[2, 3\] takes 24"),
    ],
)
def test_size_is_not_that_of_the_dtype_and_shape(path, change, message):
    write_raw(path, {"a": ENTRY | change})
    with pytest.raises(CorruptHeaderError, match=message):
        read_header(path)


@pytest.mark.parametrize(("start", "fault"), [(12, "overlaps"), (36, "leaves a gap")])
def test_tensors_overlap_or_leave_a_gap(path, start, fault):
    write_raw(path, {"a": ENTRY, "b": ENTRY | {"data_offsets": [start, start + 24]}}, bytes(start + 24))
    with pytest.raises(CorruptHeaderError, match=f"places tensor b where it {fault}"):
        read_header(path)


def test_offsets_reach_outside(path):
    write_raw(path, {"a": ENTRY, "b": ENTRY | {"data_offsets": [24, 48]}}, bytes(24))
    with pytest.raises(TruncatedFileError, match="its header describes"):
        read_header(path)


def test_bytes_beyond_the_tensors(path):
    write_raw(path, {"a": ENTRY}, bytes(25))
    with pytest.raises(CorruptHeaderError, match="describes only"):
        read_header(path)


def test_name_twice_in_a_header(path):
    entry = json.dumps(ENTRY)
    write_raw(path, f'{{"a": {entry}, "a": {entry}}}'.encode())
    with pytest.raises(DuplicateTensorError, match="lists a twice"):
        read_header(path)
