"""The Mosaic kernels in jax's GPU interpreter against float64, and lowered for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.flash_attention import (
    Options,
    flash_attention_reference,
    mosaic,
    mosaic_backward,
    mosaic_common,
    segment_metadata,
)

# (B, S, N, K, D), options, segment ids
CASES = {
    "causal": ((1, 256, 1, 1, 64), Options(True, None, None, 0.125), None),
    "window, cap, packed": ((1, 256, 2, 1, 64), Options(True, 100, 3.0, 0.125), [(100, 28, 70)]),
    "keys of other tokens, and a row of padding": ((2, 128, 1, 1, 64), Options(False, None, None, 0.2), [(40, 60), ()]),
}


def segment_ids(lengths, size):
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, size - len(row))) for row in ids], jnp.int32)


def arrays(sizes, dtype):
    batch, length, heads, kv_heads, depth = sizes
    rng = np.random.default_rng(length + heads)
    return [jnp.asarray(rng.normal(size=(batch, length, n, depth)), dtype) for n in (heads, kv_heads, kv_heads)]


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    sizes, options, lengths = CASES[name]
    ids = None if lengths is None else segment_ids(lengths, sizes[1])
    key_ids = segment_ids([(70, 20, 30), (50,)], sizes[1]) if "other" in name else None
    segments = None if ids is None else segment_metadata(ids, key_ids)
    q, k, v = arrays(sizes, "float16")
    g = arrays((*sizes[:2], sizes[2] + 7, sizes[3], sizes[4]), "float16")[0][:, :, 7:]

    # of packed rows all items go through one program, and more masked blocks through a ring than it holds
    tiles, programs = (None, 2) if ids is None else (mosaic_common.Tiles(64, 2), 1)

    def forward(q, k, v):
        return mosaic.forward(q, k, v, segments, options, tiles, programs, interpreted=True)

    def backward(q, k, v, out, lse, g):
        delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1).swapaxes(1, 2)
        saved = q, k, v, segments, lse, delta, g
        return mosaic_backward.backward(*saved, options, tiles, tiles, programs, interpreted=True)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out, lse = jax.block_until_ready(jax.jit(forward)(q, k, v))
        gradients = jax.block_until_ready(jax.jit(backward)(q, k, v, out, lse, g))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v, g)]
        expected, pull = jax.vjp(lambda *qkv: flash_attention_reference(*qkv, ids, options, None, key_ids), *wide[:3])
        expected += pull((wide[3], jnp.zeros_like(expected[1])))
    for actual, right in zip((out, lse, *gradients), expected, strict=True):
        assert error(actual, right) < 2e-3
        if ids is not None:
            actual = actual.swapaxes(1, 2) if actual.ndim == 3 else actual
            assert not np.asarray(actual)[np.asarray(ids) == 0].any()


@pytest.mark.parametrize(
    ("depth", "length", "options", "packed"),
    [
        (64, 456, Options(True, 100, 3.0, 0.1), True),
        (128, 512, Options(True, None, None, 0.1), False),
        (192, 128, Options(False, None, None, 0.1), False),
        (256, 640, Options(True, None, None, 0.1), False),
    ],
)
def test_lowers_for_hopper(depth, length, options, packed):
    """Within shared memory, too."""
    q, k, v = arrays((1, length, 2, 1, depth), "bfloat16")
    segments = segment_metadata(jnp.ones((1, length), jnp.int32)) if packed else None
    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)

    def passes(q, k, v):
        out, lse = mosaic.forward(q, k, v, segments, options)
        if depth not in mosaic_backward.KEYS_TILES:
            return out
        return mosaic_backward.backward(q, k, v, segments, lse, lse, out, options)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(passes).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == (3 if depth in mosaic_backward.KEYS_TILES else 1)


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 130), (True, 300), (False, None)])
def test_schedule_holds_every_visible_block(causal, window, packed, of_keys):
    options, step, length = Options(causal, window, None, 1.0), 64, 700
    ids = segment_ids([(300, 20, 320)], length)
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    ordered = (i - j >= 0) & (i - j < (window or length)) if causal else np.ones((length, length), bool)
    ordered = ordered.T if of_keys else ordered
    row = np.asarray(ids[0])
    same = (row[:, None] == row) & (row != 0)[:, None]
    seen = ordered & same if packed else ordered
    plan = mosaic_common.schedule(length, segment_metadata(ids) if packed else None, options, step, of_keys)
    for tile, (lo, full_lo, full_hi, hi, plain) in enumerate(np.asarray(plan)[0]):
        own = slice(tile * mosaic_common.TILE, (tile + 1) * mosaic_common.TILE)
        assert not seen[own, : lo * step].any()
        assert not seen[own, hi * step :].any()
        assert seen[own, full_lo * step : full_hi * step].all()
        assert lo <= full_lo <= full_hi <= hi
        ends = slice(lo * step, full_lo * step) if of_keys else slice(full_hi * step, hi * step)
        assert not plain or not causal or (same | ~ordered)[own, ends].all()


def test_items_of_packed_rows_are_sorted():
    """By what they visit, each once and with its own schedule: a long document is not left to a few programs."""
    segments = segment_metadata(segment_ids([(300, 20, 320), (700,)], 700))
    plan = mosaic_common.schedule(700, segments, Options(True, None, None, 1.0), 64, False)
    *entries, places = mosaic_common.flat_plan(plan, segments).reshape(-1, 6).T
    assert sorted(places.tolist()) == list(range(12))
    assert (np.stack(entries, 1) == np.asarray(plan).reshape(-1, 5)[places]).all()
    visited = entries[3] - entries[0]
    assert (visited[:-1] >= visited[1:]).all()
    assert visited[0] > visited[-1]
    assert places[0] == 11  # the end of the long document


@pytest.mark.parametrize(("keys", "stages"), [(96, 2), (128, 1)])
def test_tiles_are_checked(keys, stages):
    with pytest.raises(ValueError, match="blocks of 64 or 128 positions, at least 2 stages"):
        mosaic_common.Tiles(keys, stages)
