"""Attention to a cache on the GPU: the kernel against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention

pytestmark = pytest.mark.gpu

BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "depth"), [(32, 8, 128), (4, 4, 64), (9, 3, 96), (8, 1, 256), (32, 2, 128)]
)
def test_against_float32(heads, kv_heads, depth, window, dtype) -> None:
    rng = np.random.default_rng(heads)
    lengths = np.array([0, 1, 63, 64, 700, 2047], np.int32)
    q = jnp.asarray(rng.normal(size=(6, 1, heads, depth)), dtype)
    k, v = (rng.normal(size=(6, kv_heads, 2048, depth)).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):  # past a row's end lies anything
        k[row, :, length + 1 :], v[row, :, length + 1 :] = np.nan, np.nan
    k, v = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    run = jax.jit(lambda *a: decode_attention(*a, sliding_window=window, implementation="triton"))
    out = run(q, k, v, lengths).astype(jnp.float32)
    exact = decode_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), jnp.asarray(lengths), sliding_window=window, implementation="xla"
    )
    for row in range(6):
        assert float(jnp.linalg.norm(out[row] - exact[row]) / jnp.linalg.norm(exact[row])) < BOUNDS[dtype], row
