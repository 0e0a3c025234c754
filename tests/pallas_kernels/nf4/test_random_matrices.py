"""Matrices of sizes that nobody chose, and their transposes, packed and unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels.nf4 import dequantize_nf4, quantize_nf4
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.integers(1, 9),
    columns=st.one_of(st.integers(1, 100), st.sampled_from([64, 192])),
    double_quant=st.booleans(),
    turned=st.booleans(),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_packed_and_unpacked(reference, rows, columns, double_quant, turned, magnitude, seed):
    """Scales are the blocks' largest magnitudes, codes those of the nearest levels, and unpacking is numpy's to the bit."""
    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # every example compiles; the next test's set-up undoes it
    rng = np.random.default_rng(seed)
    columns += rows * columns % 2
    w = (magnitude * rng.standard_normal((rows, columns))).astype(np.float32)
    w[rng.random(w.shape) < 0.1] = 0
    w = w.T.copy() if turned else w
    q = quantize_nf4(jnp.asarray(w), double_quant=double_quant)
    got = np.asarray(dequantize_nf4(q, jnp.float32))
    np.testing.assert_array_equal(got.view(np.int32), reference(q).view(np.int32))
    blocks = np.zeros(-(-w.size // BLOCK) * BLOCK, np.float64)
    blocks[: w.size] = w.reshape(-1)
    blocks = blocks.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    codes = np.asarray(q.codes).reshape(-1)
    cuts = range(0, len(codes), BLOCK // 2)
    halves = [codes[cut : cut + BLOCK // 2] for cut in cuts]
    chosen = np.concatenate([NF4_LEVELS[np.concatenate([half & 15, half >> 4])] for half in halves])
    unit = np.repeat(np.where(largest > 0, largest, 1), BLOCK)[: w.size]
    normalised = w.reshape(-1) / unit
    nearest = np.abs(normalised[:, None] - NF4_LEVELS).min(axis=1)
    assert (np.abs(normalised - chosen) <= nearest + 1e-6).all()
    if not double_quant:
        np.testing.assert_array_equal(np.asarray(q.scales).reshape(-1)[largest > 0], largest[largest > 0])
