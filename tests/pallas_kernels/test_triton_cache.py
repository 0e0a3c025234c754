"""Compiled kernels are kept and found again, and no state of the disk can give another result."""

import dataclasses
import importlib
import sys
import types

import pytest

from pallas_kernels import triton_cache
from pallas_kernels.triton_call import hidden, with_room


@dataclasses.dataclass
class Result:
    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None
    llir: str | None


class Compiler:
    """As jax-triton's: it may be asked for again only what was never kept."""

    def __init__(self):
        self.calls = []

    def __call__(self, ttir, backend, options, *rest):
        self.calls.append(ttir)
        return Result(f"code of {ttir} for {options.hash()}", "kernel", 64, "long", "longer")


def given(platform="cuda", options="warps=4"):
    target = types.SimpleNamespace(backend=platform, arch=90)
    return types.SimpleNamespace(target=target, hash=lambda: "ptxas 1"), types.SimpleNamespace(hash=lambda: options)


@pytest.fixture
def kept(tmp_path):
    """(directory, the wrapped compiler, the compiler)"""
    compiler = Compiler()
    triton_cache.keep_kernels(tmp_path / "triton")
    yield tmp_path / "triton", triton_cache.keeping(compiler, Result, lambda: "versions"), compiler
    triton_cache.keep_kernels(None)


def test_a_kernel_is_compiled_once(kept):
    directory, compile_or_read, compiler = kept
    first, again = (compile_or_read("kernel a", *given(), 90, "cuda") for _ in range(2))
    assert compiler.calls == ["kernel a"]
    assert again == dataclasses.replace(first, ttgir="", llir="")
    assert len(list(directory.iterdir())) == 1  # nothing half-written lies about


def test_what_decides_the_result_is_told_apart(kept):
    _, compile_or_read, compiler = kept
    results = [
        compile_or_read(ir, *given(options=options)).binary for ir in ("a", "b") for options in ("warps=4", "warps=8")
    ]
    assert len(set(results)) == len(compiler.calls) == 4
    other_versions = triton_cache.keeping(compiler, Result, lambda: "other versions")
    other_versions("a", *given())
    compile_or_read("a", *given(platform="hip"))  # whose result is a file of its own
    compile_or_read("a", *given(platform="hip"))
    assert len(compiler.calls) == 7


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + bytes(9)])
def test_a_damaged_entry_is_made_anew(kept, damage):
    directory, compile_or_read, compiler = kept
    compile_or_read("a", *given())
    (entry,) = directory.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert compile_or_read("a", *given()).binary == "code of a for warps=4"
    assert entry.read_bytes() == sound
    assert len(compiler.calls) == 2


def test_a_directory_that_cannot_be_written_stops_nothing(kept, caplog):
    directory, compile_or_read, _ = kept
    directory.write_text("a file")
    assert compile_or_read("a", *given()).binary == "code of a for warps=4"
    assert "could not be kept" in caplog.text


def test_an_unknown_jax_triton_is_left_alone(monkeypatch, caplog):
    library = types.SimpleNamespace(compile_ttir_inplace=lambda module: module)
    before = library.compile_ttir_inplace
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    triton_cache.wrap_compiler.__wrapped__()
    assert library.compile_ttir_inplace is before
    assert "compiled again" in caplog.text


def test_a_kernel_gets_the_shared_memory_that_it_names():
    made = Result("code", "kernel", 0, None, None)
    compiler = with_room(lambda ttir: made)
    assert compiler("asm { // dynamic shared memory: 4096 }").shared_mem_bytes == 4096
    assert compiler("asm {}") is made
    takes_some = with_room(lambda ttir: dataclasses.replace(made, shared_mem_bytes=64))
    assert takes_some("asm {}").shared_mem_bytes == 64
    with pytest.raises(RuntimeError, match="kernel takes shared memory of Triton's"):
        takes_some("asm { // dynamic shared memory: 4096 }")


def test_a_hidden_module_is_there_again_afterwards():
    sys.modules.pop("colorsys", None)
    with hidden("colorsys"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv
