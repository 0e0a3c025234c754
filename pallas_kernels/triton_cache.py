"""Compiled Triton kernels kept on disk, so that a second process does not compile them again.

jax-triton compiles every kernel while a program is lowered: in each process, as it goes past Triton's own cache, and before
the program has the text that XLA's cache could know it by. Here the one function of it that compiles is wrapped. What goes
in decides what comes out, and names the entry: the kernel in Triton's IR, with the functions that it calls, its types and
constants; the options; the target and the assembler's version; the variables of the environment that Triton heeds; the
versions of both packages. An entry is compressed JSON, whose checksum tells a damaged one; it is then made anew.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = logging.getLogger("pallas_kernels")
COMPILER, RESULT = "compile_ttir_inplace", "CompilationResult"  # of jax_triton.triton_lib, 0.3 and 0.4
_directory: Path | None = None


def keep_kernels(directory: Path | None) -> None:
    """From now on compiled kernels are kept there, and taken from there; None: they are not."""
    global _directory
    _directory = directory


def kept_directory() -> Path | None:
    return _directory


@functools.cache
def wrap_compiler() -> None:
    """Have jax-triton ask for kept kernels first; where it is not as this module knows it, it is left as it is."""
    library = importlib.import_module("jax_triton.triton_lib")
    compiler, result = getattr(library, COMPILER, None), getattr(library, RESULT, None)
    if compiler is None or list(inspect.signature(compiler).parameters)[:3] != ["ttir", "backend", "options"]:
        LOG.warning("this version of jax-triton is unknown: its kernels are compiled again in every process.")
    elif not getattr(library, "_JAX_TRITON_DUMP_DIR", None):  # which wants what is on the way, too
        setattr(library, COMPILER, keeping(compiler, result, _surroundings))


def keeping(compiler: Callable[..., Any], result: Any, surroundings: Callable[[], str]) -> Callable[..., Any]:
    """`compiler`, whose results of the dataclass `result` are kept."""

    def compile_or_read(ttir: Any, backend: Any, options: Any, *rest: Any) -> Any:
        if _directory is None or backend.target.backend != "cuda":  # others leave their result in a file of their own
            return compiler(ttir, backend, options, *rest)
        parts = surroundings(), backend.hash(), repr(backend.target), options.hash(), str(ttir)
        path = _directory / hashlib.sha256("\0".join(parts).encode()).hexdigest()
        if (found := _read(path, result)) is None:
            found = compiler(ttir, backend, options, *rest)
            _write(path, found, result)
        return found

    return compile_or_read


def _surroundings() -> str:
    triton, native, jax_triton = map(importlib.import_module, ("triton", "triton._C.libtriton", "jax_triton"))
    return f"{triton.__version__} {jax_triton.__version__} {sorted(native.get_cache_invalidating_env_vars().items())}"


def _read(path: Path, result: Any) -> Any:
    """The entry, or None where there is no sound one."""
    try:
        return result(**json.loads(zlib.decompress(path.read_bytes())))
    except (OSError, zlib.error, ValueError, TypeError):
        return None


def _write(path: Path, made: Any, result: Any) -> None:
    """Under a name of its own first. What cannot be kept is not: a full disk must not stop a run."""
    fields = dataclasses.asdict(made) | {"ttgir": "", "llir": ""}  # which only a dump wants
    try:
        text = json.dumps(fields).encode()
        if dataclasses.asdict(result(**json.loads(text))) != fields:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(zlib.compress(text))
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except (OSError, TypeError, ValueError) as error:
        LOG.warning("a compiled kernel could not be kept in %s: %s", path.parent, error)
