"""The kernel in Triton's interpreter against the op itself, and compiled for every supported GPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import KVStack, append_and_attend, op, stack, turn_and_append, whole
from pallas_kernels.decode_attention.stack import LARGEST, quantized
from pallas_kernels.decode_attention.work import Work

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
CHANCE = np.random.default_rng(0)
EIGHT_BITS = [dtype.name for dtype in LARGEST]


def to_torch(array: jax.Array) -> "torch.Tensor":
    array = np.array(array)
    if array.dtype == jnp.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def to_jax(tensor: "torch.Tensor") -> jax.Array:
    if tensor.dtype == torch.float8_e4m3fn:
        return jnp.asarray(tensor.view(torch.uint8).numpy().view(jnp.float8_e4m3fn))
    return jnp.asarray(tensor.numpy())


def interpreted_call(kernel, *arrays, out, grid, num_warps, num_stages=3, aliases=None, **constants):
    """triton_call's stand-in: Triton's interpreter over torch tensors, results poisoned first."""
    tensors = [to_torch(array) for array in arrays]
    if isinstance(constants.get("W"), Work):
        constants["W"] = dataclasses.replace(constants["W"], ptx=False)  # that is for the GPU
    results = [to_torch(np.full(each.shape, 77 if each.dtype == jnp.int8 else np.nan, each.dtype)) for each in out]
    for source, target in (aliases or {}).items():
        results[target] = tensors[source]
    kernel[grid](*tensors, *results, **constants)
    return [to_jax(each) for each in results]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (op, stack):
        monkeypatch.setattr(module, "triton_call", interpreted_call)
    for module in (op, stack, whole):
        monkeypatch.setattr(module, "triton_obstacle", lambda: None)


def run(q, k, v, lengths, window, scales=(None, None), span=32) -> jax.Array:
    """The second of three layers, in pieces of at least `span` positions."""
    kept = [None if each is None else jnp.stack([each, each, each]).at[::2].set(99) for each in (k, v, *scales)]
    tiles = op.Tiles(16, 4, 2, programs=528)
    if op.by_lanes(k.dtype, q.shape[-1], q.shape[1] * q.shape[2] // k.shape[1]):
        tiles = op.Tiles(32, 1, 1, programs=528)
    op.LEAST_SPAN, before = span, (op.LEAST_SPAN, op.LANE_SPAN)
    op.LANE_SPAN = span
    try:
        parts, lse = op.in_pieces(
            q, kept[0], kept[1], lengths, *kept[2:], jnp.int32(1), q.shape[-1] ** -0.5, window, tiles
        )
    finally:
        op.LEAST_SPAN, op.LANE_SPAN = before
    return op.merged(parts, lse, q.dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "depth", "new", "window"), [(20, 1, 24, 1, None), (4, 2, 16, 1, 20), (4, 2, 16, 5, 20)]
)
def test_against_the_op(heads, kv_heads, depth, new, window, interpreted) -> None:
    """Rows of one position, of some in the first piece, of whole pieces, and full; NaN past each."""
    lengths = np.array([0, 10, 31, 32, 80 - new], np.int32)
    q = CHANCE.normal(size=(5, new, heads, depth)).astype(np.float32)
    k, v = (CHANCE.normal(size=(5, kv_heads, 80, depth)).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, :, length + new :], v[row, :, length + new :] = np.nan, np.nan
    arrays = [jnp.asarray(array) for array in (q, k, v, lengths)]
    expected = decode_attention(*arrays, sliding_window=window, implementation="xla")
    out = run(*arrays, window)
    assert np.linalg.norm(out - expected) < 1e-5 * np.linalg.norm(expected)


def test_stored_in_8_bits(interpreted) -> None:
    """Values of all sizes, one of nothing but zeros and one of almost none, and queries beyond what float16 multiplies; in two
    pieces.
    """
    lengths = jnp.asarray([3, 40], jnp.int32)
    q, k, v = (CHANCE.normal(size=size).astype(np.float32) for size in ((2, 1, 4, 16), (2, 2, 48, 16), (2, 2, 48, 16)))
    v *= np.exp(3 * CHANCE.normal(size=(2, 2, 48, 1)))
    v[:, :, 1], v[:, :, 2] = 0, 1e-30
    q = jnp.asarray(9000 * q, jnp.float16)
    (k, k_scales), (v, v_scales) = (quantized(jnp.asarray(each), "float8_e4m3fn") for each in (k / 9000, v))
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    expected = decode_attention(q.astype(jnp.float32), k, v, lengths, **scales, implementation="xla")
    out = run(q, k, v, lengths, None, (k_scales, v_scales)).astype(jnp.float32)
    assert np.linalg.norm(out - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float32", *EIGHT_BITS])
def test_new_positions_are_put_in_their_places(dtype, interpreted) -> None:
    """By the kernel as by XLA: of two tokens a row, the last has no room in the second row. Others keep what they hold."""
    old = KVStack.empty(3, 2, 2, 9, 12, dtype)
    old = jax.tree.map(lambda x: jnp.asarray(CHANCE.integers(-9, 9, x.shape), x.dtype), old)
    qkv, angles = CHANCE.normal(size=(4, 8 * 12)), CHANCE.normal(size=(2, 2, 2, 6))
    arrays = [jnp.asarray(array, jnp.float32) for array in (qkv, *angles)]
    call = [old, jnp.int32(1), *arrays, jnp.asarray([0, 8], jnp.int32)]
    q, new = turn_and_append(*call, implementation="triton")
    expected_q, expected = turn_and_append(*call, implementation="xla")
    np.testing.assert_allclose(q, expected_q, rtol=1e-5, atol=1e-6)
    for name, got in vars(new).items():
        wanted, before = getattr(expected, name), getattr(old, name)
        if wanted is None:
            assert got is None
            continue
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        # a last bit of a turned number may change which code is nearest
        far = ~np.isclose(got, wanted, rtol=1e-5, atol=1e-6)
        assert far.sum() <= 2
        if dtype == "int8":  # Triton's interpreter, rounding to fp8, carries nothing into the exponent
            np.testing.assert_allclose(got, wanted, atol=1)
        changed = got != np.asarray(before, np.float32)
        assert changed[1, 0, :, :2].any()
        assert changed[1, 1, :, 8].any()
        changed[1, 0, :, :2] = changed[1, 1, :, 8] = False
        assert not changed.any()


@pytest.mark.parametrize(("dtype", "heads", "new", "window"), [("int8", 8, 1, None), ("float8_e4m3fn", 3, 2, 20)])
def test_by_single_warps(dtype, heads, new, window, interpreted) -> None:
    """All queries that a warp has room for, or fewer; two pieces, the second of a few positions."""
    draw, lengths = np.random.default_rng(heads), jnp.asarray([33], jnp.int32)
    q, k, v = (draw.normal(size=size) for size in ((1, new, heads, 64), (1, 1, 48, 64), (1, 1, 48, 64)))
    v *= np.exp(3 * draw.normal(size=(1, 1, 48, 1)))
    v[:, :, 1], v[:, :, 2] = 0, 1e-30
    (k, k_scales), (v, v_scales) = (quantized(jnp.asarray(each, jnp.float32), dtype) for each in (k / 9000, v))
    q, scales = jnp.asarray(9000 * q, jnp.float16), {"k_scales": k_scales, "v_scales": v_scales}
    exact = {"sliding_window": window, "implementation": "xla"}
    expected = decode_attention(q.astype(jnp.float32), k, v, lengths, **scales, **exact)
    out = run(q, k, v, lengths, window, (k_scales, v_scales)).astype(jnp.float32)
    assert np.linalg.norm(out - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "new"), [("float16", 2), ("int8", 1)])
def test_all_of_a_row_in_one_launch(dtype, new, interpreted) -> None:
    """Against the same by XLA: an empty row, one of a step and some, one with room for a single token."""
    draw, lengths = np.random.default_rng(new), jnp.asarray([0, 70, 79], jnp.int32)
    old = KVStack.empty(2, 3, 2, 80, 12, dtype)
    old = jax.tree.map(lambda x: jnp.asarray(draw.integers(1, 9, x.shape), x.dtype), old)
    qkv, cos = draw.normal(size=(3 * new, 8 * 12)), np.cos(draw.normal(size=(3, new, 6)))
    arrays = jnp.asarray(qkv, jnp.float16), jnp.asarray(cos, jnp.float32), jnp.asarray((1 - cos**2) ** 0.5, jnp.float32)
    out, stack = append_and_attend(old, jnp.int32(1), *arrays, lengths, implementation="whole")
    out = np.asarray(out, np.float32)
    q, expected = turn_and_append(old, jnp.int32(1), *arrays, lengths, implementation="xla")
    scales = {"k_scales": expected.key_scales, "v_scales": expected.value_scales}
    wide = [each.astype(jnp.float32) if dtype == "float16" else each for each in (expected.keys, expected.values)]
    o = decode_attention(q.astype(jnp.float32), *wide, lengths, **scales, layer=jnp.int32(1), implementation="xla")
    rows = (slice(None), 0) if new > 1 else slice(None)  # a token without room attends to what it may
    assert np.linalg.norm(out[rows] - o[rows]) < 2e-3 * np.linalg.norm(o[rows])
    for got, wanted in zip(jax.tree.leaves(stack), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-3, atol=1e-3 + (dtype == "int8")
        )


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 1 / 254), ("float8_e4m3fn", 1 / 16)])
def test_codes_are_as_near_as_said(dtype, bound) -> None:
    x = np.concatenate([CHANCE.normal(size=(50, 64)) * np.exp(CHANCE.normal(size=(50, 1)) * 9), np.zeros((1, 64))])
    codes, scales = quantized(jnp.asarray(x, jnp.float32), dtype)
    error = np.abs(np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[:, None] - x)
    top = np.abs(x).max(axis=1, keepdims=True)
    allowed = bound * top if dtype == "int8" else np.maximum(bound * np.abs(x), 2.0**-10 * top / 448)
    assert (error <= 1.001 * allowed).all()


@pytest.mark.parametrize(("programs", "expected"), [(528, [2, 60, 8, 1, 1]), (396, [2, 45, 6, 3, 1])])
def test_pieces_fill_a_gpu_and_no_more(programs, expected) -> None:
    tiles = op.Tiles(64, 4, 2, programs)
    cases = [(1, 256), (1, 32768), (8, 32768), (64, 32768), (1000, 32768)]
    sizes = [
        op.work_of((batch, 1, 32, 128), (batch, 8, size, 128), "int8", 1.0, None, tiles, 128) for batch, size in cases
    ]
    assert [each.pieces for each in sizes] == expected


def test_old_gpus_refuse_what_they_have_no_instructions_for() -> None:
    assert "compute capability 8.9" in str(stack.storage_obstacle(jnp.float8_e4m3fn, (8, 6)))
    assert stack.storage_obstacle(jnp.float8_e4m3fn, (8, 9)) is None
    assert stack.storage_obstacle(jnp.int8, (8, 0)) is None


def test_refusals() -> None:
    q, k = jnp.zeros((2, 65, 4, 8), jnp.bfloat16), jnp.zeros((2, 2, 9, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="at most 128 queries of a key head, new positions times heads, not 130"):
        decode_attention(q, k, k, jnp.zeros(2, jnp.int32), implementation="triton")
    with pytest.raises(ValueError, match="it takes bfloat16 or float16, not float32"):
        decode_attention(
            *(x.astype(jnp.float32) for x in (q[:, :1], k, k)), jnp.zeros(2, jnp.int32), implementation="triton"
        )
    for each, scales in (
        (k, jnp.zeros((2, 2, 9))),
        (k.astype(jnp.int8), None),
        (k.astype(jnp.int8), jnp.zeros((2, 2))),
    ):
        with pytest.raises(ValueError, match=r"needs k_scales \[B, K, C\] for a cache of int8, float8_e4m3fn"):
            decode_attention(q, each, each, jnp.zeros(2, jnp.int32), k_scales=scales, v_scales=scales)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        decode_attention(q[:, :1], k, k, jnp.zeros(2, jnp.int32), implementation="triton")


def test_compiles_for_every_gpu() -> None:
    script = Path(__file__).with_name("compile_triton.py")
    modules = [f"pallas_kernels.decode_attention.{name}_kernels" for name in ("triton", "lane", "append")]
    command = [sys.executable, str(script), *modules]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok") == 9


def test_gradients_are_not_asked_of_it() -> None:
    """Generation is not differentiated; the op on XLA is, as any function of jnp is."""
    q, k = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 2, 4, 8))
    grad = jax.grad(lambda q: decode_attention(q, k, k, jnp.ones(1, jnp.int32)).sum())(q)
    assert np.isfinite(grad).all()
