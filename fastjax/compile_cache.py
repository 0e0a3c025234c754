"""Compiled programs kept on disk, so that a second run of the same shapes starts at once.

JAX's persistent cache, switched on for GPUs unless the user has chosen a directory or turned it off
(FASTJAX_COMPILE_CACHE=0). A program's key is its text with every kernel in it, the compiler's options and version, and
the device: a changed kernel is another program. That text holds Triton's kernels compiled, so they have a cache of their
own, beside XLA's. On a CPU it stays off, where programs are small and one that was compiled for another processor's
instructions would crash.
"""

import os
from pathlib import Path

import jax

from pallas_kernels.triton_cache import keep_kernels

SWITCH = "FASTJAX_COMPILE_CACHE"
MOST_BYTES = 20 << 30  # the least recently used go first


def enable_compile_cache() -> Path | None:
    """Called where a program of ours starts. The directory in use, or None where there is none."""
    if os.environ.get(SWITCH) == "0" or jax.default_backend() != "gpu":
        return None
    chosen = jax.config.jax_compilation_cache_dir
    if chosen is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(base) / "fastjax" / "xla")
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        # a step has many small programs around the large one, and each would be compiled anew
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "://" not in chosen:  # jax takes a bucket too
        keep_kernels(Path(chosen) / "triton")
    return Path(chosen)
