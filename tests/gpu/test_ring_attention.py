"""Attention to parts of the keys by the kernels that a GPU has, and around a ring of GPUs, in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fastjax.parallel.mesh import make_mesh
from fastjax.parallel.ring_attention import Ring, ring_attention_backward, ring_attention_forward
from fastjax.parallel.sequence import SequenceSplit
from pallas_kernels.flash_attention import (
    Options,
    attention_backward,
    attention_forward,
    attention_part_backward,
    flash_attention_reference,
    segment_metadata,
)

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DEPTH = 4, 2, 128


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def arrays(rows: int, length: int) -> list[jax.Array]:
    """q, k, v and cotangents of the output."""
    rng = np.random.default_rng(length)
    shapes = [(rows, length, heads, DEPTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def documents(rows: int, length: int) -> jax.Array:
    """Ids of documents of random lengths, then padding."""
    rng = np.random.default_rng(1)
    ids = 1 + np.cumsum(rng.random((rows, length)) < 4 / length, axis=1)
    ids[:, length - 100 :] = 0
    return jnp.asarray(ids, jnp.int32)


# from 4096 positions on cuDNN makes the gradients, without segments
@pytest.mark.parametrize(("half", "packed"), [(520, False), (520, True), (4096, False)])
def test_parts_make_a_whole(half, packed):
    """The later queries' attention to earlier keys, of a row of twice the length, against float32."""
    q, k, v, g = arrays(1, 2 * half)
    ids = documents(1, 2 * half) if packed else None
    early, late = slice(0, half), slice(half, 2 * half)
    segments = None if ids is None else segment_metadata(ids[:, late], ids[:, early])
    part = jax.jit(lambda *qkv: attention_forward(*qkv, causal=False, segment_ids=segments)[1])(
        q[:, late], k[:, early], v[:, early]
    )
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
        options = Options(False, None, None, DEPTH**-0.5)
        queries, keys = (None, None) if ids is None else (ids[:, late], ids[:, early])
        pieces = wide[0][:, late], wide[1][:, early], wide[2][:, early]
        truth, pull = jax.vjp(lambda *qkv: flash_attention_reference(*qkv, queries, options, None, keys), *pieces)
        expected = *truth, *pull((wide[3][:, late], jnp.zeros_like(truth[1])))
    backward = jax.jit(lambda *a: attention_part_backward(*a, causal=False, segment_ids=segments))
    # given the part's own output and log-sum-exp, a part is a whole
    grads = backward(q[:, late], k[:, early], v[:, early], part.out, part.lse, g[:, late])
    for what, actual, right in zip(
        ("out", "lse", "dq", "dk", "dv"), (part.out, part.lse, *grads), expected, strict=True
    ):
        assert np.isfinite(np.asarray(actual, np.float32)).all(), what
        assert error(actual, right) < 1e-2, what
    # with as much weight on other keys, and the same output, gradients are half as large
    halved = backward(q[:, late], k[:, early], v[:, early], part.out, part.lse + np.log(2), g[:, late])
    for actual, right in zip(halved, grads, strict=True):
        assert error(actual, np.asarray(right, np.float32) / 2) < 1e-2


@pytest.mark.parametrize(("length", "packed"), [(8192, True), (32768, False)])
def test_around_a_ring_of_gpus(length, packed):
    """Against one GPU's attention to whole rows."""
    devices = len(jax.devices())
    if devices < 2:
        pytest.skip("needs two GPUs or more")
    q, k, v, g = arrays(1, length)
    ids, split = documents(1, length) if packed else None, SequenceSplit("context")
    mesh, whole, parts = make_mesh(context=devices), PartitionSpec(), PartitionSpec(None, "context")

    def both(ids, q, k, v, g):
        ring = Ring.of(split, ids)
        out, saved = ring_attention_forward(q, k, v, ring)
        return out, *ring_attention_backward(saved, g, ring)

    chunks = np.split(np.arange(length), 2 * devices)
    order = np.concatenate([chunks[c] for i in range(devices) for c in (i, 2 * devices - 1 - i)])
    run = jax.shard_map(both, mesh=mesh, in_specs=(whole, *[parts] * 4), out_specs=parts, check_vma=False)
    results = jax.jit(run)(ids, *(x[:, order] for x in (q, k, v, g)))
    out, saved = jax.jit(lambda *qkv: attention_forward(*qkv, segment_ids=ids))(q, k, v)
    expected = out, *jax.jit(attention_backward)(saved, g)
    for what, actual, right in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert error(actual, np.asarray(right, np.float32)[:, order]) < 1e-2, what
