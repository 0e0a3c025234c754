"""Compiling is most of the tests' time, and most of what they test does not turn on how well XLA optimises.

Lightly is without XLA's expensive optimisations, and from fusions to LLVM by the older of XLA's two ways on a CPU: the
newer one goes through MLIR, which is three quarters of the time that a training step takes to compile. jax has a setting
for the former; the latter is an option of XLA's that jax can hand over for a whole process only, so that it is added here
to what jax asks of each compilation.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jax._src import compiler
from jax._src.lib import xla_client

ROOT = Path(__file__).parents[1]
OLD_EMITTERS = "xla_cpu_disable_new_fusion_emitters"


def environment(directory: Path, devices: int = 1) -> dict[str, str]:
    """For processes that a test starts: what one has compiled is there for the others, in a directory of the test's."""
    # transformers would import torch, which takes it seconds in every process and is of no use there
    (directory / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    return {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_extra_options={OLD_EMITTERS}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(directory / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def field(number: int, content: bytes) -> bytes:
    """Of a protocol buffer."""
    tag = number << 3 | 2
    return bytes([tag] if tag < 128 else [tag & 127 | 128, tag >> 7]) + bytes([len(content)]) + content


# CompileOptionsProto.executable_build_options.debug_options.xla_backend_extra_options; messages in a row are merged
EXTRA = field(3, field(3, field(500, field(1, OLD_EMITTERS.encode()))))


def allow() -> None:
    """From here on programs are compiled lightly while jax_disable_most_optimizations is set."""
    plain = compiler.get_compile_options

    def options(*args: Any, **kwargs: Any) -> xla_client.CompileOptions:
        made = plain(*args, **kwargs)
        if jax.config.read("jax_disable_most_optimizations"):
            made = xla_client.CompileOptions.ParseFromString(made.SerializeAsString() + EXTRA)
        return made

    compiler.get_compile_options = options
