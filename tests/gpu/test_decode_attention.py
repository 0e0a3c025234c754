"""Attention to a cache on the GPU: the kernel against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import (
    KVStack,
    append,
    append_and_attend,
    chunk_attention,
    storage_obstacle,
    turn_and_append,
)
from pallas_kernels.decode_attention.stack import LARGEST, quantized

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


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", [each.name for each in LARGEST])
def test_stored_in_8_bits(dtype, new) -> None:
    """The kernel on a stack's layer against float32 on the same codes."""
    if storage_obstacle(dtype):
        pytest.skip(storage_obstacle(dtype))
    rng = np.random.default_rng(0)
    lengths = jnp.asarray([0, 63, 700, 2048 - new], jnp.int32)
    q = jnp.asarray(rng.normal(size=(4, new, 32, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(2, 4, 8, 2048, 128)), jnp.float32) for _ in range(2))
    v *= jnp.asarray(np.exp(3 * rng.normal(size=(2, 4, 8, 2048, 1))), jnp.float32)  # of all sizes
    (k, k_scales), (v, v_scales) = quantized(k, dtype), quantized(v, dtype)
    options = {"k_scales": k_scales, "v_scales": v_scales}
    for layer in (0, 1):
        run = jax.jit(lambda *a: decode_attention(*a[:4], layer=a[4], **options, implementation="triton"))
        out = run(q, k, v, lengths, jnp.int32(layer)).astype(jnp.float32)
        exact = decode_attention(
            q.astype(jnp.float32), k, v, lengths, layer=jnp.int32(layer), **options, implementation="xla"
        )
        assert float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", *(each.name for each in LARGEST)])
def test_new_positions_are_written_in_place(dtype) -> None:
    """By the kernel as by XLA, and into the memory that was given."""
    if storage_obstacle(dtype):
        pytest.skip(storage_obstacle(dtype))
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.normal(size=(6, 48 * 128)), jnp.bfloat16)
    angles = [jnp.asarray(rng.normal(size=(3, 2, 64)), jnp.float32) for _ in range(2)]
    lengths = jnp.asarray([0, 100, 255], jnp.int32)

    def write(name):
        def run(stack):
            return turn_and_append(stack, jnp.int32(1), qkv, *angles, lengths, implementation=name)

        stack = KVStack.empty(2, 3, 8, 256, 128, dtype)
        before = stack.keys.unsafe_buffer_pointer()
        q, after = jax.jit(run, donate_argnums=0)(stack)
        assert name != "triton" or after.keys.unsafe_buffer_pointer() == before
        return q, after

    (q, written), (expected_q, expected) = write("triton"), write("xla")
    assert float(jnp.max(jnp.abs(q.astype(jnp.float32) - expected_q.astype(jnp.float32)))) < 0.05

    def real(x, scales):
        return np.asarray(x.astype(jnp.float32) * (1 if scales is None else scales[..., None]))

    for names in (("keys", "key_scales"), ("values", "value_scales")):
        got, wanted = (real(*(getattr(each, name) for name in names)) for each in (written, expected))
        assert np.linalg.norm(got - wanted) <= 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", *(each.name for each in LARGEST)])
def test_all_of_a_row_in_one_launch(dtype, new) -> None:
    """By one kernel as by several, on the same cache, written in place."""
    if storage_obstacle(dtype):
        pytest.skip(storage_obstacle(dtype))
    rng = np.random.default_rng(1)
    before = [jnp.asarray(rng.normal(size=(5, 768, 8, 128)), jnp.bfloat16) for _ in range(2)]
    qkv = jnp.asarray(rng.normal(size=(5 * new, 48 * 128)), jnp.bfloat16)
    turn = rng.normal(size=(5, new, 64))
    angles = [jnp.asarray(each, jnp.float32) for each in (np.cos(turn), np.sin(turn))]
    lengths = jnp.asarray([0, 63, 64, 500, 768 - new], jnp.int32)

    def run(name):
        stack = append(KVStack.empty(2, 5, 8, 768, 128, dtype), jnp.int32(1), *before, jnp.zeros(5, jnp.int32))
        place = stack.keys.unsafe_buffer_pointer()
        call = jax.jit(
            lambda stack: append_and_attend(stack, jnp.int32(1), qkv, *angles, lengths, implementation=name),
            donate_argnums=0,
        )
        out, after = call(stack)
        assert after.keys.unsafe_buffer_pointer() == place
        return [np.asarray(each.astype(jnp.float32)) for each in jax.tree.leaves((out, after))]

    got, expected = run("whole"), run("separate")
    for mine, theirs in zip(got, expected, strict=True):
        assert np.linalg.norm(mine - theirs) <= 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", *(each.name for each in LARGEST)])
def test_a_part_of_a_prompt(dtype) -> None:
    """By the kernels that are chosen here, against XLA in float32 on the same cache."""
    if storage_obstacle(dtype):
        pytest.skip(storage_obstacle(dtype))
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 512, heads, 128)), jnp.bfloat16) for heads in (32, 8, 8))
    before = [jnp.asarray(rng.normal(size=(4, 2048, 8, 128)), jnp.bfloat16) for _ in range(2)]
    stack = append(KVStack.empty(2, 4, 8, 2048, 128, dtype), jnp.int32(1), *before, jnp.zeros(4, jnp.int32))
    lengths, counts = jnp.asarray([0, 300, 1024, 1500]), jnp.asarray([512, 100, 512, 0])
    rest = (stack, jnp.int32(1), lengths, counts)
    out = jax.jit(chunk_attention)(q, k, v, *rest).astype(jnp.float32)
    exact = chunk_attention(*(x.astype(jnp.float32) for x in (q, k, v)), *rest, implementation="xla")
    for row, count in enumerate(counts.tolist()[:3]):
        assert float(jnp.linalg.norm((out - exact)[row, :count]) / jnp.linalg.norm(exact[row, :count])) < 1e-2, row
