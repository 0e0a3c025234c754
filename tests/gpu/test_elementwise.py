"""On a GPU: the norm, rope, SwiGLU and low-rank kernels against plain jnp in float32, for each dtype and odd shapes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.low_rank import low_rank_gradients, project_into, room_for
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from pallas_kernels.rope import rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

pytestmark = pytest.mark.gpu
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
DTYPES = list(BOUNDS)


def normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def agrees(function: Callable[..., Any], arrays: list[jax.Array], dtype: str, widths: list[int | None]) -> None:
    """The kernel's results in `dtype`, up to `widths` columns of each, against plain jnp on the CPU in float32."""
    results = jax.tree.leaves(jax.jit(lambda *a: function(*a, implementation="triton"))(*arrays))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        wide = [jax.device_put(np.asarray(array, np.float32), cpu) for array in arrays]
        expected = jax.tree.leaves(jax.jit(lambda *a: function(*a, implementation="xla"))(*wide))
    for result, truth, width in zip(results, expected, widths, strict=True):
        # cut first: columns left for others to fill hold anything, and a cast of that may warn
        ours, truth = (np.asarray(each[..., :width], np.float64) for each in (result, truth))
        assert np.isfinite(ours).all()
        assert np.linalg.norm(ours - truth) <= BOUNDS[dtype] * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "room"), [(1, 2, 0), (7, 507, 5), (300, 4096, 64), (33, 5120, 64)])
def test_norm(rows: int, width: int, room: int, dtype: str) -> None:
    x, weight, g, residual = normal(dtype, (rows, width), (width,), (rows, width + 3), (rows, width + 64))
    agrees(lambda x, w, **how: rms_norm_forward(x, w, 1e-5, room=room, **how), [x, weight], dtype, [width])
    backward = [x, weight, g, residual]
    agrees(lambda x, w, *gs, **how: rms_norm_backward(x, w, 1e-5, *gs, room=room, **how), backward, dtype, [width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 2), (6, 2, 22), (32, 8, 128), (5, 1, 96)], ids=str)
def test_rope(heads: tuple[int, int, int], dtype: str) -> None:
    many, few, depth = heads
    width = (many + 2 * few) * depth
    (qkv,) = normal(dtype, (3 * 37, width))
    angles = normal("float32", (3, 37, depth // 2), (3, 37, depth // 2))
    agrees(lambda *a, **how: rope_qkv(*a, many, few, **how), [qkv, *angles], dtype, [None] * 3)
    gradients = normal(dtype, *((3, 37, count, depth) for count in (many, few, few)))
    agrees(lambda *a, **how: rope_qkv_backward(*a, room=64, **how), [*gradients, *angles], dtype, [width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "room"), [(1, 1, 0), (7, 1023, 5), (65, 14336, 64)])
def test_swiglu(rows: int, width: int, room: int, dtype: str) -> None:
    gate_up, g = normal(dtype, (rows, 2 * width), (rows, width + 3))
    agrees(lambda x, **how: swiglu_forward(x, room=room, **how), [gate_up], dtype, [width])
    agrees(lambda *a, **how: swiglu_backward(*a, room=room, **how), [gate_up, g], dtype, [2 * width, width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "rank"), [(1, 3, 1), (100, 507, 48), (8200, 512, 70)])
def test_projection(rows: int, inner: int, rank: int, dtype: str) -> None:
    x, a = normal(dtype, (rows, inner + room_for(rank)), (inner, rank))
    (scales,) = normal("float32", (rank,))

    def z(*arrays: jax.Array, **how: Any) -> jax.Array:
        return project_into(*arrays, **how)[:, inner:]

    agrees(z, [x, a, scales], dtype, [None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "ranks", "widths"),
    [(1, (1,), (3,)), (37, (4, 0, 20), (130, 7, 33)), (4100, (16, 16, 16), (4096, 1024, 1024)), (515, (64,), (1500,))],
)
def test_gradients_in_one_reading(rows: int, ranks: tuple, widths: tuple, dtype: str) -> None:
    rank, width = sum(ranks), sum(widths)
    z, g, b = normal(dtype, (rows, rank), (rows, width + room_for(rank)), (rank, width))
    (scales,) = normal("float32", (rank,))

    def thin(*arrays: jax.Array, **how: Any) -> Any:
        out, db = low_rank_gradients(*arrays, ranks, widths, **how)
        return out[:, width:], db

    agrees(thin, [z, g, b, scales], dtype, [None] * (1 + sum(r > 0 for r in ranks)))
    twice = [jax.jit(lambda *a: thin(*a, implementation="triton"))(z, g, b, scales) for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, twice), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))  # repeats bit by bit
