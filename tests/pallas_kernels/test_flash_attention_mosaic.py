"""The Mosaic kernels in jax's GPU interpreter against float64, and lowered for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.flash_attention import Options, flash_attention_reference, mosaic, segment_metadata

# (B, S, N, K, D), options, segment ids
CASES = {
    "causal": ((1, 256, 2, 1, 64), Options(True, None, None, 0.125), None),
    "window, cap, packed": ((1, 256, 1, 1, 64), Options(True, 100, 3.0, 0.125), [(100, 28, 70)]),
    "all see all, padding only": ((2, 128, 1, 1, 64), Options(False, None, None, 0.2), [(60, 60), ()]),
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
def test_forward_against_float64(name):
    sizes, options, lengths = CASES[name]
    ids = None if lengths is None else segment_ids(lengths, sizes[1])
    segments = None if ids is None else segment_metadata(ids)
    q, k, v = arrays(sizes, "float16")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        run = jax.jit(lambda *qkv: mosaic.forward(*qkv, segments, options, programs=2, interpreted=True))
        results = jax.block_until_ready(run(q, k, v))
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v))
        expected = flash_attention_reference(*wide, ids, options)
    for actual, right in zip(results, expected, strict=True):
        assert error(actual, right) < 2e-3
        if ids is not None:
            actual = actual.swapaxes(1, 2) if actual.ndim == 3 else actual
            assert not np.asarray(actual)[np.asarray(ids) == 0].any()


@pytest.mark.parametrize(
    ("depth", "length", "options"),
    [
        (64, 456, Options(True, 100, 3.0, 0.1)),
        (128, 512, Options(True, None, None, 0.1)),
        (192, 128, Options(False, None, None, 0.1)),
        (256, 640, Options(True, None, None, 0.1)),
    ],
)
def test_forward_lowers_for_hopper(depth, length, options):
    """Within shared memory, too."""
    q, k, v = arrays((1, length, 2, 1, depth), "bfloat16")
    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    segments = segment_metadata(jnp.ones((1, length), jnp.int32))
    with jax.sharding.use_abstract_mesh(mesh):
        for given in (None, segments):
            traced = jax.jit(lambda *a, given=given: mosaic.forward(*a, given, options)).trace(q, k, v)
            assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 130, 300])
def test_schedule_holds_every_visible_block(causal, window):
    if window and not causal:
        pytest.skip("a window is causal")
    options, keys, length = Options(causal, window, None, 1.0), 64, 700
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    seen = (i - j >= 0) & (i - j < (window or length)) if causal else np.ones((length, length), bool)
    for tile, (lo, full_lo, full_hi, hi, _) in enumerate(
        np.asarray(mosaic.schedule(length, None, options, keys, of_keys=False))[0]
    ):
        rows = seen[tile * mosaic.TILE : (tile + 1) * mosaic.TILE]
        assert not rows[:, : lo * keys].any()
        assert not rows[:, hi * keys :].any()
        assert rows[:, full_lo * keys : full_hi * keys].all()
        assert lo <= full_lo <= full_hi <= hi


@pytest.mark.parametrize(("keys", "stages"), [(96, 2), (128, 1)])
def test_tiles_are_checked(keys, stages):
    with pytest.raises(ValueError, match="blocks of 64 or 128 positions, at least 2 stages"):
        mosaic.Tiles(keys, stages)
