"""Norm, rope, SwiGLU and low-rank kernels, interpreted on the CPU against float64, and compiled for three GPUs."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.low_rank import gradients, low_rank_gradients, project_into, wide
from pallas_kernels.rms_norm import op as norm
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from pallas_kernels.rope import packed as rope
from pallas_kernels.rope import rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import packed as swiglu
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

BOUNDS = {"float32": 1e-6, "float16": 1e-3}  # the interpreter truncates to bfloat16: that is tested on a GPU
DTYPES = list(BOUNDS)
MODULES = [norm, rope, swiglu, wide, gradients]


def interpreted_call(kernel, *arrays, out, grid, num_warps, num_stages=3, aliases=None, **constants):
    """triton_call's stand-in: Triton's interpreter over torch tensors, results poisoned first."""
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    shapes = list(out) if isinstance(out, tuple) else [out]
    results = [torch.from_numpy(np.full(each.shape, np.nan, each.dtype)) for each in shapes]
    for source, target in (aliases or {}).items():
        results[target] = tensors[source]
    kernel[grid](*tensors, *results, **constants)
    returned = tuple(jnp.asarray(each.numpy()) for each in results)
    return returned if isinstance(out, tuple) else returned[0]


@pytest.fixture(autouse=True)
def on_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "triton_obstacle", lambda: None)
        monkeypatch.setattr(module, "triton_call", interpreted_call)


def normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def in_float64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


def close(actual: jax.Array, expected: np.ndarray, dtype: str) -> None:
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "room"), [(1, 1, 0), (3, 507, 0), (5, 64, 64), (2, 96, 7)])
def test_norm(rows: int, width: int, room: int, dtype: str) -> None:
    x, weight, g, residual = normal(dtype, (rows, width), (width,), (rows, width + 3), (rows, width + 5))
    xs, ws, gs, rs = in_float64(x, weight, g[:, :width], residual[:, :width])
    r = 1 / np.sqrt((xs**2).mean(1, keepdims=True) + 1e-5)
    y = rms_norm_forward(x, weight, 1e-5, room=room)
    assert y.shape == (rows, width + room)
    close(y[:, :width], xs * r * ws, dtype)
    h = gs * ws
    dx = r * (h - xs * r * (h * xs * r).mean(1, keepdims=True))
    close(rms_norm_backward(x, weight, 1e-5, g, residual, room=room)[:, :width], dx + rs, dtype)
    alone = rms_norm_backward(x, weight, 1e-5, g)
    np.testing.assert_allclose(np.asarray(alone, np.float64), dx, atol=20 * BOUNDS[dtype])  # at H = 1 it cancels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads", "half"), [((1, 1), 1, 1, 1), ((2, 3), 6, 2, 8), ((1, 5), 5, 1, 11)]
)
def test_rope(shape: tuple[int, int], heads: int, kv_heads: int, half: int, dtype: str) -> None:
    rows, depth = shape[0] * shape[1], 2 * half
    width = (heads + 2 * kv_heads) * depth
    (qkv,) = normal(dtype, (rows, width))
    cos, sin = normal("float32", (*shape, half), (*shape, half))
    wide_x, c, s = in_float64(qkv.reshape(*shape, -1, depth), cos[:, :, None], sin[:, :, None])

    def turned(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    q, k, v = rope_qkv(qkv, cos, sin, heads, kv_heads)
    both = heads + kv_heads
    close(q, turned(wide_x[:, :, :heads], s), dtype)
    close(k, turned(wide_x[:, :, heads:both], s), dtype)
    np.testing.assert_array_equal(np.asarray(v, np.float64), wide_x[:, :, both:])
    back = rope_qkv_backward(q, k, v, cos, sin, room=4)
    assert back.shape == (rows, width + 4)
    q, k, v = in_float64(q, k, v)
    expected = np.concatenate([turned(q, -s), turned(k, -s), v], axis=2).reshape(rows, width)
    close(back[:, :width], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "room"), [(1, 1, 0), (3, 507, 64), (2, 1025, 3)])
def test_swiglu(rows: int, width: int, room: int, dtype: str) -> None:
    gate_up, g = normal(dtype, (rows, 2 * width), (rows, width + 2))
    gate, up, dy = in_float64(gate_up[:, :width], gate_up[:, width:], g[:, :width])
    s = 1 / (1 + np.exp(-gate))
    y = swiglu_forward(gate_up, room=room)
    assert y.shape == (rows, width + room)
    close(y[:, :width], gate * s * up, dtype)
    gradient, again = swiglu_backward(gate_up, g, room=room)
    assert gradient.shape == (rows, 2 * width + room)
    expected = np.concatenate([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], axis=1)
    close(gradient[:, : 2 * width], expected, dtype)
    close(again, gate * s * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "rank"), [(1, 3, 1), (2, 2300, 20), (37, 200, 48), (65, 129, 70)])
def test_projection_beside_its_operand(
    rows: int, inner: int, rank: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "FEW", 8)  # rows one by one in the first cases, in tiles in the others
    x, a = normal(dtype, (rows, inner + wide.room_for(rank)), (inner, rank))
    (scales,) = normal("float32", (rank,))
    out = project_into(x, a, scales)
    np.testing.assert_array_equal(out[:, :inner], x[:, :inner])
    assert not out[:, inner + rank :].any()
    xs, factor, s = in_float64(x[:, :inner], a, scales)
    close(out[:, inner : inner + rank], xs @ factor * s, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "ranks", "widths"),
    [(1, (1,), (3,)), (37, (4, 0, 20), (130, 7, 33)), (150, (16,), (600,)), (33, (64, 3), (140, 5))],
)
def test_gradients_in_one_reading(rows: int, ranks: tuple, widths: tuple, dtype: str) -> None:
    """b is filled off its diagonal too: those values must not be read."""
    rank, width = sum(ranks), sum(widths)
    z, g, b = normal(dtype, (rows, rank), (rows, width + wide.room_for(rank)), (rank, width))
    (scales,) = normal("float32", (rank,))
    out, db = low_rank_gradients(z, g, b, scales, ranks, widths)
    np.testing.assert_array_equal(out[:, :width], g[:, :width])
    assert not out[:, width + rank :].any()
    zs, gs, bs, s = in_float64(z, g[:, :width], b, scales)
    row, column, blocks = 0, 0, iter(db)
    for r, w in zip(ranks, widths, strict=True):
        here, across = slice(row, row + r), slice(column, column + w)
        if r:
            block = next(blocks)
            assert block.dtype == jnp.float32
            close(block, zs[:, here].T @ gs[:, across], "float32")
            dz = out[:, width + row : width + row + r]
            close(dz, gs[:, across] @ bs[here, across].T * s[here], dtype)
        row, column = row + r, column + w
    assert next(blocks, None) is None


def test_they_compile_for_every_supported_gpu() -> None:
    tool = Path(__file__).with_name("compile_triton.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    modules = [f"pallas_kernels.{op}.triton_kernels" for op in ("rms_norm", "rope", "swiglu", "low_rank")]
    done = subprocess.run([sys.executable, str(tool), *modules], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
