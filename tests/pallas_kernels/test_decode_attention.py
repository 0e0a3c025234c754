"""Attention to a cache against flash_attention's reference on the whole of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import KVStack, append, chunk_attention, op

CHANCE = np.random.default_rng(0)


def exact(q, k, v, length, window) -> np.ndarray:
    """float64, one row and head at a time; q [T, N, D], k and v [K, C, D]."""
    new, heads, dim = q.shape
    out = np.zeros(q.shape)
    for t in range(new):
        last = length + t
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(heads):
            group = head // (heads // k.shape[0])
            keys, values = k[group, first : last + 1], v[group, first : last + 1]
            logits = keys @ q[t, head] / np.sqrt(dim)
            weights = np.exp(logits - logits.max())
            out[t, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_against_float64(new, heads, kv_heads, window) -> None:
    lengths = np.array([0, 7, 20 - new])
    q = CHANCE.normal(size=(3, new, heads, 16)).astype(np.float32)
    k, v = (CHANCE.normal(size=(3, kv_heads, 20, 16)).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):  # past a row's end lies anything
        k[row, :, length + new :], v[row, :, length + new :] = np.nan, np.inf
    out = decode_attention(*map(jnp.asarray, (q, k, v, lengths.astype(np.int32))), sliding_window=window)
    for row, length in enumerate(lengths):
        reference = exact(*(x[row].astype(np.float64) for x in (q, k, v)), length, window)
        assert np.linalg.norm(out[row] - reference) < 1e-5 * np.linalg.norm(reference)


def test_many_new_positions_in_parts(monkeypatch) -> None:
    arrays = [
        jnp.asarray(CHANCE.normal(size=size), jnp.float32) for size in ((2, 6, 4, 8), (2, 2, 16, 8), (2, 2, 16, 8))
    ]
    lengths = jnp.asarray([0, 9], jnp.int32)
    whole = decode_attention(*arrays, lengths)
    monkeypatch.setattr(op, "PART", 2)
    np.testing.assert_allclose(decode_attention(*arrays, lengths), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "stored", "bound"), [("float32", "float32", 1e-6), ("bfloat16", "int8", 0.01)])
def test_a_part_of_a_prompt(dtype, stored, bound) -> None:
    """Rows that held nothing, less than a piece, several; that have some new positions, all of them, none; in layer 1."""
    lengths, counts, new, layer = np.array([0, 5, 16, 19]), np.array([8, 3, 8, 0]), 8, jnp.int32(1)
    q = CHANCE.normal(size=(4, new, 4, 16)).astype(np.float32)
    k, v = (CHANCE.normal(size=(4, 24 + new, 2, 16)).astype(np.float32) for _ in range(2))
    none = jnp.zeros(4, jnp.int32)
    stack = append(KVStack.empty(2, 4, 2, 24 + new, 16, stored), layer, jnp.asarray(k), jnp.asarray(v), none)
    if stored != "int8":  # past a row's end lies anything
        past = np.arange(24 + new)[None, :] >= lengths[:, None]
        keys, values = (
            jnp.where(past[None, :, None, :, None], jnp.asarray(jnp.nan, x.dtype), x)
            for x in (stack.keys, stack.values)
        )
        stack = KVStack(keys, values)
    own = [np.stack([x[row, n : n + new] for row, n in enumerate(lengths)]) for x in (k, v)]
    rows = [jnp.asarray(x, jnp.int32) for x in (lengths, counts)]
    new_ones = [jnp.asarray(x, dtype) for x in (q, *own)]
    out = jax.jit(chunk_attention)(*new_ones, stack, layer, *rows).astype(jnp.float32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        reference = exact(
            *(x.astype(np.float64) for x in (q[row], k[row].swapaxes(0, 1), v[row].swapaxes(0, 1))), length, None
        )
        error = np.linalg.norm(out[row, :count] - reference[:count])
        assert error <= bound * np.linalg.norm(reference[:count])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 1, 4, 8), (2, 3, 9, 8), (2,)), "K dividing N"),
        (((2, 1, 4, 8), (1, 2, 9, 8), (2,)), "needs q"),
        (((2, 1, 4, 8), (2, 2, 9, 8), (3,)), "one length a row"),
        (((2, 1, 4, 8), (2, 0, 9, 8), (2,)), "K dividing N"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message) -> None:
    q, k, lengths = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, k, lengths.astype(jnp.int32))


def test_options_and_dtypes_that_mean_nothing() -> None:
    q, k, lengths = jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 2, 9, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"sliding_window=0 must be at least 1"):
        decode_attention(q, k, k, lengths, sliding_window=0)
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        decode_attention(q, k, k, lengths, scale=float("nan"))
    with pytest.raises(TypeError, match="decode_attention takes floating-point arrays, but q is int32"):
        decode_attention(q.astype(jnp.int32), k, k, lengths)
