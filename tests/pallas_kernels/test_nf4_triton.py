"""The unpacking kernel, interpreted on the CPU: the bits of the plain-jnp unpacking; and compiled for three GPUs."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.nf4 import NF4Array, dequantize_nf4, quantize_nf4
from pallas_kernels.nf4 import unpack as unpack_module

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_torch(x: jax.Array) -> torch.Tensor:
    array = np.array(x)
    return (
        torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        if array.dtype == jnp.bfloat16
        else torch.from_numpy(array)
    )


def interpreted_call(kernel, *arrays, out, grid, num_warps, aliases, **constants):
    """triton_call's stand-in: Triton's interpreter over torch tensors."""
    tensors = [to_torch(array) for array in arrays]
    poison = torch.full(out.shape, float("nan"), dtype=TORCH[jnp.dtype(out.dtype).name])
    target = tensors[next(iter(aliases))] if aliases else poison
    kernel[grid](*tensors, target, **constants)
    return jnp.asarray(target.float().numpy()).astype(out.dtype)


def stacked(shape: tuple[int, ...], seed: int = 0, double_quant: bool = True) -> NF4Array:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    packed = [quantize_nf4(jnp.asarray(matrix), double_quant=double_quant) for matrix in w]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 64), (2, 5, 192), (2, 9, 4096), (1, 4, 320)])
def test_same_bits(shape: tuple, double_quant: bool, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "triton_call", interpreted_call)
    q = stacked(shape, double_quant=double_quant)
    every = unpack_module.unpack([q], jnp.arange(shape[0], dtype=jnp.int32), dtype)
    np.testing.assert_array_equal(np.asarray(every), np.asarray(dequantize_nf4(q, dtype)))


def test_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "triton_call", interpreted_call)
    qs = [stacked((3, height, 128), seed=height) for height in (8, 2, 3)]
    got = unpack_module.unpack(qs, jnp.array([2], jnp.int32), jnp.float32, rows=2, columns=5)
    assert got.shape == (1, 15, 133)
    expected = np.concatenate([np.asarray(dequantize_nf4(q, jnp.float32))[2] for q in qs])
    np.testing.assert_array_equal(np.asarray(got)[0, :13, :128], expected)


def test_it_compiles_for_every_supported_gpu() -> None:
    tool = Path(__file__).with_name("compile_triton.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(tool), "pallas_kernels.nf4.triton_kernels"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
