"""Segments and masks that nobody chose: attention and its block metadata against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import Options, attention_backward, attention_forward, segment_metadata
from pallas_kernels.flash_attention.mosaic_common import TILE, schedule
from pallas_kernels.flash_attention.segments import GRAIN


def drawn(examples: int) -> settings:
    """The same examples every time, none looked for again: what a test costs is what it says."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=checks
    )


@pytest.fixture(autouse=True)
def lightly():
    """Every example has shapes of its own, hence programs; every test's set-up undoes this."""
    jax.config.update("jax_disable_most_optimizations", True)


def ids_of(draw, length: int) -> np.ndarray:
    """Rising runs as packing makes them, with padding at the end or between, or anything at all."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        return rng.integers(0, draw(st.integers(1, 5)), length).astype(np.int32)
    cuts = np.sort(rng.integers(0, length + 1, draw(st.integers(0, 6))))
    ids = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    ids[draw(st.integers(0, length)) :] = 0
    return ids.astype(np.int32)


@drawn(25)
@given(st.data())
def test_blocks_that_segments_can_see(data):
    """Every visible pair lies within reach, and a run holds one segment throughout: of own keys all that there are."""
    ids = ids_of(data.draw, 512)
    own = data.draw(st.booleans())
    keys = ids if own else ids_of(data.draw, 512)
    metadata = segment_metadata(jnp.asarray(ids)[None], None if own else jnp.asarray(keys)[None])
    pairs = (ids[:, None] == keys[None]) & (ids != 0)[:, None]
    for ranges, same in zip(np.asarray(metadata.ranges)[0], (pairs, pairs.T), strict=True):
        for block, (first, end, run_first, run_end) in enumerate(ranges):
            rows = slice(block * GRAIN, (block + 1) * GRAIN)
            seen = np.flatnonzero(same[rows].any(axis=0))
            if len(seen):
                assert first <= seen[0]
                assert seen[-1] < end
            whole = same[rows].all(axis=0)  # what all of the block's positions see
            if run_first < run_end:
                assert whole[run_first:run_end].all()
            if own:
                assert (run_first < run_end) == whole[rows].all()
                for beside in (run_first - GRAIN, run_end) if run_first < run_end else ():
                    assert not 0 <= beside < 512 or not whole[beside : beside + GRAIN].all()


@drawn(25)
@given(st.data())
def test_blocks_that_a_schedule_visits(data):
    """None that holds a visible pair is left out, and only blocks that are visible whole go unmasked."""
    length, step, of_keys = (
        data.draw(st.sampled_from([512, 600])),
        data.draw(st.sampled_from([64, 128])),
        data.draw(st.booleans()),
    )
    causal = data.draw(st.sampled_from([True, True, False]))
    window = data.draw(st.sampled_from([300, 70, None])) if causal else None
    ids = ids_of(data.draw, length) if data.draw(st.booleans()) else None
    segments = None if ids is None else segment_metadata(jnp.asarray(ids)[None])
    plan = np.asarray(schedule(length, segments, Options(causal, window, None, 1.0), step, of_keys))[0]
    place = np.arange(length)
    seen = np.ones((length, length), bool) if not causal else place[:, None] >= place[None]
    if window is not None:
        seen &= place[:, None] - place[None] < window
    if ids is not None:
        seen &= (ids[:, None] == ids[None]) & (ids != 0)[:, None]
    seen = seen.T if of_keys else seen
    for tile, (lo, full_lo, full_hi, hi, _) in enumerate(plan):
        assert lo <= full_lo <= full_hi <= hi
        own = seen[tile * TILE : (tile + 1) * TILE]
        for block in range(-(-length // step)):
            part = own[:, block * step : (block + 1) * step]
            assert lo <= block < hi or not part.any()
            assert not full_lo <= block < full_hi or part.all()


@drawn(5)
@given(st.data())
def test_attention_is_what_its_mask_says(data):
    """Output, log-sum-exp and gradients in float32 against numpy in float64."""
    batch, length, kv_heads, group = (data.draw(st.integers(1, most)) for most in (2, 33, 2, 3))
    depth, causal = data.draw(st.sampled_from([4, 24])), data.draw(st.booleans())
    window = data.draw(st.sampled_from([None, 1, 5])) if causal else None
    cap = data.draw(st.sampled_from([None, 1.5]))
    ids = np.stack([ids_of(data.draw, length) for _ in range(batch)]) if data.draw(st.booleans()) else None
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    heads = kv_heads * group
    q, k, v, g = (rng.standard_normal((batch, length, n, depth)) for n in (heads, kv_heads, kv_heads, heads))
    options = {"causal": causal, "sliding_window": window, "soft_cap": cap, "implementation": "xla"}

    @jax.jit
    def both(q, k, v, g):
        out, saved = attention_forward(q, k, v, segment_ids=None if ids is None else jnp.asarray(ids), **options)
        return out, saved.arrays[-1], *attention_backward(saved, g)

    got = both(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, g)))
    for ours, theirs in zip(got, dense(q, k, v, g, ids, causal, window, cap), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max())
        )


def dense(q, k, v, g, ids, causal, window, cap):
    """(out, lse, dq, dk, dv), every logit in memory."""
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    t = scale * np.einsum("bind,bjnd->bnij", q, k)
    slope = np.ones_like(t)
    if cap is not None:
        t = cap * np.tanh(t / cap)
        slope = 1 - (t / cap) ** 2
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    seen = np.broadcast_to((i >= j) | (not causal), (q.shape[0], 1, length, length)).copy()
    if window is not None:
        seen &= i - j < window
    if ids is not None:
        seen &= ((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None])[:, None]
    weights = np.where(seen, np.exp(t), 0)
    total = weights.sum(axis=-1, keepdims=True)
    p = weights / np.where(total == 0, 1, total)
    lse = np.log(np.where(total == 0, 1, total))[..., 0]
    dp = np.einsum("bind,bjnd->bnij", g, v)
    ds = scale * slope * p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    def grouped(x):
        return x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, -1).sum(axis=3)

    out, dq = np.einsum("bnij,bjnd->bind", p, v), np.einsum("bnij,bjnd->bind", ds, k)
    return out, lse, dq, grouped(np.einsum("bnij,bind->bjnd", ds, q)), grouped(np.einsum("bnij,bind->bjnd", p, g))
