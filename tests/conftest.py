"""Settings of the whole test run: devices, strict promotion, and what needs a GPU.

Eight virtual CPU devices let sharding be tested in the same process as everything else. Implicit dtype and rank
promotion are errors, because a silent float32 in a bfloat16 model costs memory and time without failing any comparison.
Without `-m gpu` the tests run on the CPU even where a GPU is present: their tolerances are those of true float32.
"""

import os
import shutil
import tempfile
from pathlib import Path

# Read when jax starts, hence set before it is imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastjax-tests-")  # a test finds no cache of the user's

import jax
import pytest

from tests import lightly


def wants_gpu(config: pytest.Config) -> bool:
    """Whether this run selects the GPU tests explicitly."""
    expression = config.getoption("markexpr", "")
    return "gpu" in expression and "not gpu" not in expression


def pytest_configure(config: pytest.Config) -> None:
    if not wants_gpu(config):
        jax.config.update("jax_platforms", "cpu")
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: Triton kernels run on torch CPU tensors
    lightly.allow()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)  # and leaves none behind


# Bit-exact kernels, memory, and the numbers of other libraries are tested on programs as users compile them.
COMPILED_LIGHTLY = {
    "train",
    "models",
    "generate",
    "cli",
    "parallel",
    "distributed",
    "test_api.py",
    "test_bench_step.py",
    "parity/test_peft.py",
    "parity/test_saved_models.py",
    "weights/test_load.py",
    "weights/test_load_mesh.py",
    "pallas_kernels/test_flash_attention.py",
    "pallas_kernels/test_flash_attention_mosaic.py",
    "pallas_kernels/test_linear_cross_entropy.py",
    "pallas_kernels/nf4/test_mosaic.py",
    "pallas_kernels/test_decode_attention.py",
    "pallas_kernels/test_decode_attention_triton.py",
    "pallas_kernels/nf4/test_grouped.py",
    "pallas_kernels/nf4/test_matmul.py",
    "pallas_kernels/nf4/test_matvec.py",
    "pallas_kernels/test_random_shapes.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    path = item.path.relative_to(Path(__file__).parent)
    light = not COMPILED_LIGHTLY.isdisjoint({path.parts[0], str(path)})
    jax.config.update("jax_disable_most_optimizations", light)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(light))  # for processes that a test starts


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not wants_gpu(config):
        reason = "needs an NVIDIA GPU: run with -m gpu on a machine that has one"
    elif jax.default_backend() != "gpu":
        reason = f"needs an NVIDIA GPU: jax sees only {jax.devices()[0].platform}"
    else:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))
