"""Triton kernels called from JAX: the one door to jax-triton, which only a machine with an NVIDIA GPU needs.

A kernel lives in a file of its own (`<op>/triton_kernels.py`, plain `@triton.jit` functions), imported when it is about
to run: importing `pallas_kernels` needs neither Triton nor a GPU. Arguments are the input arrays, then the outputs, then
compile-time constants by name; sizes are constants too, as every shape is compiled anyway.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.triton_cache import COMPILER, kept_directory, wrap_compiler

OLDEST = (8, 0)
ROOM = re.compile(r"dynamic shared memory: (\d+)")


def triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    capability = cuda_capability()
    if capability is None:
        return "it needs an NVIDIA GPU, and jax runs on another device"
    if capability < OLDEST:
        return (
            f"it needs an NVIDIA GPU of compute capability 8.0 or later (Ampere), not {capability[0]}.{capability[1]}"
        )
    if not _installed():
        _warn_not_installed()
        return "it needs jax-triton (pip install 'fastjax[cuda13]')"
    return None


@functools.cache
def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


@functools.cache
def _warn_not_installed() -> None:
    warnings.warn(
        "this GPU runs slower than it could: jax-triton is not installed (pip install 'fastjax[cuda13]').", stacklevel=4
    )


def triton_call(
    kernel: Any,
    *arrays: jax.Array,
    out: Any,
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 3,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> Any:
    """Run `kernel` over `grid`. `out`: a ShapeDtypeStruct or a sequence of them; `aliases`: input index -> output index."""
    jax_triton: Any = importlib.import_module("jax_triton")
    start_triton()
    has_room()  # before kernels are kept, so that what is kept says what it takes
    if kept_directory() is not None:
        wrap_compiler()
    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        input_output_aliases=dict(aliases or {}),
        out_shape=out,
        **constants,
    )
    # jax-triton says of no result that it differs between a shard_map's devices; it does wherever an argument does
    axes = tuple(sorted(frozenset().union(*map(_varying_axes, arrays))))
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), results) if axes else results


@functools.cache
def has_room() -> bool:
    """Whether a kernel that says so gets shared memory beyond what Triton itself gives it.

    Inline PTX can declare 48 KB; for more a launch has to ask, and Triton asks for what its own operations take. Kernels
    name what theirs take in a comment of their PTX, and jax-triton's one function that compiles is wrapped to heed it.
    """
    library = importlib.import_module("jax_triton.triton_lib")
    compiler = getattr(library, COMPILER, None)
    if compiler is None or "ttir" not in inspect.signature(compiler).parameters:
        warnings.warn("this version of jax-triton is unknown: some kernels run slower than they could.", stacklevel=2)
        return False
    setattr(library, COMPILER, with_room(compiler))
    return True


def with_room(compiler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiler)
    def compile_with_room(ttir: Any, *rest: Any) -> Any:
        asked = ROOM.search(str(ttir))
        made = compiler(ttir, *rest)
        if asked is None:
            return made
        if made.shared_mem_bytes:
            raise RuntimeError(f"{made.name} takes shared memory of Triton's, where its own is to begin.")
        return dataclasses.replace(made, shared_mem_bytes=int(asked[1]))

    return compile_with_room


@functools.cache
def start_triton() -> None:
    """Triton's native part imports torch where there is one, seconds of a process's first step, to know its tensors at
    once; it knows them without, too. It is asked for something here while torch is out of its sight.
    """
    native = importlib.import_module("triton._C.libtriton")
    if hasattr(native, "native_specialize_impl"):
        with hidden("torch"):
            native.native_specialize_impl(None, 1, False, True, True)


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """As if `module` were not installed, for this thread, unless it is imported already."""
    finder = _Hiding(module, threading.get_ident())
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Hiding(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, thread: int) -> None:
        self.module, self.thread = module, thread

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == self.module and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _varying_axes(array: jax.Array) -> frozenset[str]:
    """The mesh axes along which devices may hold different values; none outside `shard_map`, or with check_vma=False."""
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())
