"""Attention around a ring of devices against attention in float64, outputs and gradients; how rows are divided."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fastjax.parallel.mesh import make_mesh
from fastjax.parallel.ring_attention import Ring, ring_attention_backward, ring_attention_forward
from fastjax.parallel.sequence import ROWS, SequenceSplit, part_length
from pallas_kernels.flash_attention import Options, flash_attention_reference

SPLIT = SequenceSplit("context")
WHOLE, PARTS = PartitionSpec(), PartitionSpec(None, "context")
DEVICES, LENGTH = 4, 64
# documents within chunks, across two and many of them, one a chunk; padding in a chunk, in a row
DOCUMENTS = [(5, 30, 3, 20), (64,), (8,) * 8, ()]


def ids_of(lengths):
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, LENGTH - len(row))) for row in ids], jnp.int32)


def own_order(x, devices):
    """Positions as the devices hold them, device after device."""
    chunks = np.split(np.asarray(x), 2 * devices, axis=1)
    return np.concatenate([chunks[c] for i in range(devices) for c in (i, 2 * devices - 1 - i)], axis=1)


def on_the_ring(devices, function, specs, out_specs):
    mesh = make_mesh(context=devices)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))


@pytest.mark.parametrize(
    ("devices", "packed", "dtype", "bound"), [(2, False, "bfloat16", 1e-2), (DEVICES, True, "float32", 1e-5)]
)
def test_against_float64(devices, packed, dtype, bound):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(len(DOCUMENTS), LENGTH, heads, 8)) for heads in (4, 2, 2, 4))
    ids = ids_of(DOCUMENTS) if packed else None

    arrays = [jnp.asarray(own_order(x, devices), dtype) for x in (q, k, v, g)]

    def both(ids, q, k, v, g):
        ring = Ring.of(SPLIT, ids)
        out, saved = ring_attention_forward(q, k, v, ring)
        return out, saved.lse, *ring_attention_backward(saved, g, ring)

    outputs = (PARTS, PartitionSpec(None, None, "context"), *[PARTS] * 3)
    program = on_the_ring(devices, both, (WHOLE, *[PARTS] * 4), outputs).lower(ids, *arrays).compile()
    # to each other device go keys and values, once in either pass; from each come gradients; the loop has one turn
    assert program.as_text().count(" collective-permute(") == 3 * (devices - 1)
    out, lse, *grads = program(ids, *arrays)
    with jax.enable_x64(True):
        reference = partial(flash_attention_reference, segment_ids=ids, options=Options(True, None, None, 8**-0.5))
        truth, pull = jax.vjp(reference, *(jnp.asarray(x) for x in (q, k, v)))
        expected = (truth[0], truth[1].swapaxes(1, 2), *pull((jnp.asarray(g), jnp.zeros_like(truth[1]))))
    for mine, right in zip((out, lse.swapaxes(1, 2), *grads), expected, strict=True):
        right = own_order(right, devices)
        assert np.linalg.norm(np.asarray(mine, np.float64) - right) < bound * np.linalg.norm(right)


def test_a_part_is_an_early_and_a_late_chunk():
    """A row that is not divisible is filled up at its end."""
    row = np.arange(1, 60)[None]
    own = on_the_ring(DEVICES, partial(SPLIT.own, fill=-1), WHOLE, PARTS)(row)
    np.testing.assert_array_equal(own, own_order(np.pad(row, ((0, 0), (0, 5)), constant_values=-1), DEVICES))
    assert part_length(2 * DEVICES * ROWS, DEVICES) == 2 * ROWS
    assert part_length(2 * DEVICES * ROWS + 1, DEVICES) == 4 * ROWS
