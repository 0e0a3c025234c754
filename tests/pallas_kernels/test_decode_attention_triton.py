"""The kernel in Triton's interpreter against the op itself, and compiled for every supported GPU."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import op

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
CHANCE = np.random.default_rng(0)


def run(q, k, v, lengths, window, span) -> np.ndarray:
    from pallas_kernels.decode_attention.triton_kernels import decode_kernel

    sizes = op.launch_sizes(q.shape, k.shape, q.shape[-1] ** -0.5, window) | {"SPAN": span, "BN": 16}
    pieces = -(-k.shape[2] // span)
    out, lse = torch.full((pieces, *q.shape), torch.nan), torch.full((pieces, *q.shape[:2]), torch.nan)
    arrays = [torch.from_numpy(array) for array in (q, k, v, lengths)]
    decode_kernel[(q.shape[0] * k.shape[1], pieces)](*arrays, out, lse, **sizes)
    weights = torch.softmax(lse, 0)
    return (weights[..., None] * out).sum(0).numpy()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(4, 2, 16), (20, 1, 24)])
def test_against_the_op(heads, kv_heads, depth, window) -> None:
    """Rows of one position, of some in the first piece, of whole pieces, and full; NaN past each."""
    lengths = np.array([0, 10, 31, 32, 79], np.int32)
    q = CHANCE.normal(size=(5, heads, depth)).astype(np.float32)
    k, v = (CHANCE.normal(size=(5, kv_heads, 80, depth)).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, :, length + 1 :], v[row, :, length + 1 :] = np.nan, np.nan
    expected = decode_attention(*map(jnp.asarray, (q[:, None], k, v, lengths)), sliding_window=window)[:, 0]
    out = run(q, k, v, lengths, window, span=32)
    assert np.linalg.norm(out - expected) < 1e-5 * np.linalg.norm(expected)


def test_pieces_fill_a_gpu_and_no_more() -> None:
    cases = [(1, 256), (1, 32768), (8, 32768), (64, 32768)]
    spans = [op.launch_sizes((batch, 32, 128), (batch, 8, size, 128), 1.0, None)["SPAN"] for batch, size in cases]
    assert spans == [128, 512, 4096, 32768]


def test_refusals() -> None:
    q, k = jnp.zeros((2, 3, 4, 8), jnp.bfloat16), jnp.zeros((2, 2, 9, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="it takes one new position a row, not 3"):
        decode_attention(q, k, k, jnp.zeros(2, jnp.int32), implementation="triton")
    with pytest.raises(ValueError, match="it takes bfloat16 or float16, not float32"):
        decode_attention(
            *(x.astype(jnp.float32) for x in (q[:, :1], k, k)), jnp.zeros(2, jnp.int32), implementation="triton"
        )
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        decode_attention(q[:, :1], k, k, jnp.zeros(2, jnp.int32), implementation="triton")


def test_compiles_for_every_gpu() -> None:
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, str(script), "pallas_kernels.decode_attention.triton_kernels"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok") == 2


def test_gradients_are_not_asked_of_it() -> None:
    """Generation is not differentiated; the op on XLA is, as any function of jnp is."""
    q, k = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 2, 4, 8))
    grad = jax.grad(lambda q: decode_attention(q, k, k, jnp.ones(1, jnp.int32)).sum())(q)
    assert np.isfinite(grad).all()
