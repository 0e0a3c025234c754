"""The Triton kernels in Triton's interpreter against the same softmax in jnp at float64, and compiled for real GPUs."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import Options
from pallas_kernels.linear_cross_entropy import softmax as reference
from pallas_kernels.linear_cross_entropy.triton_softmax import Tiles, resident_tiles, walking_tiles

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

KERNELS = "pallas_kernels.linear_cross_entropy.triton_kernels"
OPTIONS = {
    "plain": {},
    "cap": {"soft_cap": 2.0},
    "smooth": {"label_smoothing": 0.2},
    "all": {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 0.02},
}


def run(logits, labels, scale, options, block, dtype):
    """What both ways, fused and apart, make of the logits: (statistics, ds) twice, all poisoned before."""
    kernels = importlib.import_module(KERNELS)
    rows, words = logits.shape
    logits, labels, scale = (torch.from_numpy(np.asarray(a).copy()) for a in (logits, labels, scale))
    walk = {"VOCABULARY": words, "CAP": options.soft_cap or 0.0, "BLOCK": block}
    slopes = {"PEAK": options.peak, "UNIFORM": options.uniform, "Z": options.z_loss}
    fused, apart = ([torch.full((rows,), torch.nan) for _ in range(3)] for _ in range(2))
    ds = [torch.full((rows, words), torch.nan, dtype=dtype) for _ in range(2)]
    kernels.statistics_kernel[(rows,)](logits, labels, *apart, TOTAL=options.label_smoothing != 0, **walk)
    kernels.gradient_kernel[(rows,)](logits, labels, scale, apart[0], ds[1], **walk, **slopes)
    parts = -(-words // block)
    partial = [torch.full((rows, parts), 7.0) for _ in range(2)]
    for _ in range(2):  # the interpreter runs one program at a time: none may wait, and the second time none needs to
        arrivals = torch.tensor([parts] * rows + [0], dtype=torch.int32)
        kernels.softmax_kernel[(rows * parts,)](
            logits, labels, scale, arrivals, *fused, ds[0], arrivals, *partial, ROWS=rows, **walk, **slopes
        )
    return [
        ([s.numpy() for s in statistics], d.float().numpy()) for statistics, d in zip((fused, apart), ds, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "words", "block", "dtype"),
    [(name, 507, 128, "float32") for name in OPTIONS]
    + [("all", 5, 64, "float32"), ("all", 256, 64, "bfloat16"), ("plain", 65, 64, "float16")],
)
def test_kernels_against_float64(name, words, block, dtype):
    options = Options(vocabulary=words, **OPTIONS[name])
    rng = np.random.default_rng(words)
    logits = (4 * rng.normal(size=(7, words))).astype(np.float32)
    labels = rng.integers(0, words, size=7).astype(np.int32)
    labels[1:3] = -1, words  # words of another part of the head
    scale = np.array([1, 1, 0.5, -2, 0, 1e-3, 1], np.float32)
    logits[4] = np.nan  # an empty row
    with jax.enable_x64(True):
        exact = reference.statistics_and_gradients(
            jnp.asarray(logits, jnp.float64), labels, jnp.asarray(scale, jnp.float64), jnp.dtype("float64"), options
        )
        statistics, ds = jax.tree.map(np.asarray, exact)
    bound = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[dtype]
    full = scale != 0
    for ours, our_ds in run(logits, labels, scale, options, block, getattr(torch, dtype)):
        for mine, truth in zip(ours, statistics, strict=True):
            np.testing.assert_allclose(mine[full], truth[full], rtol=1e-5, atol=1e-5)
        assert np.linalg.norm(our_ds - ds) <= bound * np.linalg.norm(ds)
        assert not our_ds[4].any()


def test_extreme_rows():
    """Rows of one size, of huge spread, and with one logit far above: no overflow; a NaN spreads over its row."""
    words, options = 200, Options(vocabulary=200)
    logits = np.zeros((4, words), np.float32)
    logits[1] = np.linspace(-3e4, 3e4, words)
    logits[2, 130] = 1e6
    logits[3, 7] = np.nan
    labels, scale = np.array([0, 199, 130, 1], np.int32), np.ones(4, np.float32)
    for (lse, at_label, _), ds in run(logits, labels, scale, options, 64, torch.float32):
        np.testing.assert_allclose((lse - at_label)[:3], [np.log(200), 0, 0], atol=2e-3)
        np.testing.assert_allclose(ds[0], 1 / 200 - (np.arange(200) == 0), atol=1e-6)
        assert np.isnan(lse[3])
        assert np.isnan(ds[3]).all()


def test_compiles_for_gpus():
    """sm_80, sm_89 and sm_90, in a process whose Triton compiles."""
    script = Path(__file__).parent / "compile_triton.py"
    run = subprocess.run([sys.executable, script, KERNELS], capture_output=True, text=True, env=_environment())
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("ok") == 6


def _environment() -> dict[str, str]:
    import os

    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize("words", [1, 5, 507, 4096, 128256])
def test_tiles(words):
    for tiles in (resident_tiles(words), walking_tiles(words)):
        assert 64 <= tiles.block <= 4096
        assert tiles.block < 2 * max(words, 64)


def test_refuses_tiles():
    with pytest.raises(ValueError, match="power of two"):
        Tiles(block=96, num_warps=4)
