"""The Triton kernels in Triton's interpreter against float64, over masks, paddings and tiles; compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.flash_attention import Options, flash_attention_reference, segment_metadata
from pallas_kernels.flash_attention import triton as launches
from pallas_kernels.flash_attention.segments import KEYS, QUERIES
from pallas_kernels.flash_attention.triton import Tiles

# name: (B, S, N, K, D), options, segment lengths per row or "random", queries and keys of a tile
CASES = {
    "causal, ragged": ((2, 75, 2, 1, 16), {}, None, (64, 32)),
    "all see all, ragged": ((1, 100, 1, 1, 24), {"causal": False}, None, (64, 64)),
    "window": ((1, 200, 1, 1, 16), {"sliding_window": 40}, None, (64, 32)),
    "packed": ((1, 300, 2, 1, 16), {}, [(130, 1, 120)], (64, 64)),
    "packed, all see all": ((2, 160, 1, 1, 16), {"causal": False}, [(80, 80), (4,)], (64, 32)),
    "any ids": ((1, 140, 1, 1, 16), {"causal": False}, "random", (64, 64)),
    "every option": (
        (2, 200, 2, 1, 8),
        {"sliding_window": 90, "soft_cap": 2.0, "scale": 1.0, "dropout_rate": 0.3},
        [(130, 50), ()],
        (128, 64),
    ),
    "keys of other tokens": ((2, 200, 2, 1, 16), {"causal": False}, [(70, 100), (200,)], (64, 32)),
    "dropout": ((1, 90, 2, 1, 16), {"dropout_rate": 0.3}, None, (64, 64)),
}
SEED = 1234567


def segment_ids(lengths, batch, size):
    if lengths == "random":
        return jnp.asarray(np.random.default_rng(size).integers(-3, 3, (batch, size)), jnp.int32)
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, size - len(row))) for row in ids], jnp.int32)


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in Triton's interpreter on arrays copied to torch and back; outputs start as NaN."""

    def run(kernel, *arrays, out, grid, num_warps, num_stages, **constants):
        inputs = [torch.tensor(np.asarray(a)) for a in arrays]
        outputs = [torch.full(o.shape, float("nan"), dtype=getattr(torch, o.dtype.name)) for o in out]
        kernel[grid](*inputs, *outputs, **constants)
        return tuple(jnp.asarray(o.numpy()) for o in outputs)

    monkeypatch.setattr(launches, "triton_call", run)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    sizes, options, lengths, (queries, keys) = CASES[name]
    batch, length, heads, kv_heads, depth = sizes
    options = Options(
        options.get("causal", True), options.get("sliding_window"), options.get("soft_cap"),
        options.get("scale", depth**-0.5), options.get("dropout_rate", 0.0),
    )  # fmt: skip
    rng = np.random.default_rng(length)
    wide, narrow = (batch, length, heads, depth), (batch, length, kv_heads, depth)
    q, k, v, dout = (jnp.asarray(rng.normal(size=s), jnp.float16) for s in (wide, narrow, narrow, wide))
    dlse = jnp.asarray(rng.normal(size=(batch, heads, length)), jnp.float32)
    ids = None if lengths is None else segment_ids(lengths, batch, length)
    key_ids = segment_ids([(20, 150, 10), (90,)], batch, length) if "other" in name else None
    segments = None if ids is None else segment_metadata(ids, key_ids)
    seed = jnp.int32(SEED) if options.dropout_rate else None

    out, lse = launches.forward(q, k, v, segments, seed, options, Tiles(queries, keys, 4, 1))
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1).swapaxes(1, 2) - dlse
    tiles = {"queries": Tiles(queries, keys, 4, 1), "keys": Tiles(keys, queries, 4, 1)}
    grads = launches.backward(q, k, v, segments, seed, lse, delta, dout, options, tiles)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v)]
        truth, pull = jax.vjp(lambda *qkv: flash_attention_reference(*qkv, ids, options, seed, key_ids), *arrays)
        expected = *truth, *pull((jnp.asarray(np.asarray(dout, np.float64)), jnp.asarray(np.asarray(dlse, np.float64))))
    for actual, right in zip((out, lse, *grads), expected, strict=True):
        assert error(actual, right) < 2e-3
        if ids is not None:
            padding = np.asarray(ids) == 0
            actual = actual.swapaxes(1, 2) if actual.ndim == 3 else actual
            assert not np.asarray(actual)[padding].any()


def pairs(ids, other_ids):
    return (ids[:, :, None] == other_ids[:, None, :]) & (ids != 0)[:, :, None]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_skipped_holds_no_pair(seed, others):
    """Also what is taken for one whole segment is that; ids random, sorted or packed, keys the queries' own or others."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 700))

    def random_ids():
        ids = rng.integers(-2, [3, 6, 40][seed % 3], (2, length))
        if seed % 4:
            ids = np.sort(ids, axis=1) if seed % 4 == 1 else np.repeat(ids, 90, axis=1)[:, :length]
        return jnp.asarray(ids, jnp.int32)

    metadata = segment_metadata(random_ids(), random_ids() if others else None)
    ids, ranges = np.asarray(metadata.ids), np.asarray(metadata.ranges)
    for side in (QUERIES, KEYS):
        seen = pairs(ids[:, side], ids[:, 1 - side])
        for b, i in np.ndindex(ranges.shape[0], ranges.shape[2]):
            own, (first, end, run_first, run_end) = slice(i * 64, i * 64 + 64), ranges[b, side, i]
            assert not seen[b, own, :first].any()
            assert not seen[b, own, end:].any()
            assert seen[b, own, run_first:run_end].all()
            assert run_end <= run_first or first <= run_first < run_end <= end
            assert others or run_end <= run_first or run_first <= i * 64 < run_end


def test_compiles_for_gpus():
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, script, "pallas_kernels.flash_attention.triton_kernels"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("ok") == 6


@pytest.mark.parametrize("size", [8, 48, 512])
def test_tiles_are_checked(size):
    with pytest.raises(ValueError, match="powers of 2 from 16 to 256"):
        Tiles(64, size, 4, 2)
