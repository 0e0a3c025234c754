"""Attention on the GPU: every implementation, both passes, over shapes, head sizes, dtypes and options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Options, attention_backward, attention_forward, flash_attention_reference
from pallas_kernels.workloads import packed_lengths

pytestmark = pytest.mark.gpu

BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}
# name: (B, S, N, K, D), options, segment lengths per row or "random"
CASES = {
    "one token": ((1, 1, 1, 1, 64), {}, None),
    "causal": ((2, 512, 4, 2, 128), {}, None),
    "causal, odd": ((2, 333, 6, 2, 128), {}, None),
    "D 64": ((1, 257, 4, 4, 64), {}, None),
    "D 96": ((1, 300, 4, 2, 96), {}, None),
    "D 192": ((1, 200, 2, 1, 192), {}, None),
    "D 256": ((1, 384, 2, 1, 256), {}, None),
    "all see all": ((1, 391, 4, 1, 128), {"causal": False}, None),
    "window": ((1, 1000, 4, 2, 128), {"sliding_window": 200}, None),
    "cap": ((2, 320, 2, 1, 128), {"soft_cap": 1.5, "scale": 0.3}, None),
    "packed": ((2, 700, 4, 2, 128), {}, [(300, 1, 320), (65, 500)]),
    "packed, all see all": ((2, 640, 2, 1, 64), {"causal": False}, [(384, 256), (4,)]),
    "many documents": ((2, 4096, 8, 2, 128), {}, [packed_lengths(np.random.default_rng(i), 4096, 150) for i in (0, 1)]),
    "any ids": ((2, 450, 2, 1, 128), {}, "random"),
    "dropout": ((1, 300, 2, 1, 128), {"dropout_rate": 0.2, "dropout_seed": 5}, None),
    "every option": (
        (2, 520, 4, 2, 96),
        {"sliding_window": 150, "soft_cap": 2.0, "dropout_rate": 0.1, "dropout_seed": 7},
        [(380, 100), ()],
    ),
}


def segment_ids(lengths, batch, size):
    if lengths == "random":
        return jnp.asarray(np.random.default_rng(size).integers(0, 4, (batch, size)), jnp.int32)
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, size - len(row))) for row in ids], jnp.int32)


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["triton", "cudnn", None])
def test_against_float32(implementation, name, dtype):
    sizes, options, lengths = CASES[name]
    batch, length, heads, kv_heads, depth = sizes
    if implementation == "cudnn" and (
        {"soft_cap", "dropout_rate"} & set(options) or (lengths is not None and length % 2) or name == "one token"
    ):
        pytest.skip("cuDNN does not do this")
    rng = np.random.default_rng(length)
    wide, narrow = (batch, length, heads, depth), (batch, length, kv_heads, depth)
    q, k, v, dout = (jnp.asarray(rng.normal(size=s), dtype) for s in (wide, narrow, narrow, wide))
    ids = None if lengths is None else segment_ids(lengths, batch, length)
    run = jax.jit(lambda *a: attention_forward(*a, segment_ids=ids, implementation=implementation, **options))
    out, saved = run(q, k, v)
    results = out, saved.arrays[-1], *jax.jit(attention_backward)(saved, dout)

    whole = Options(
        options.get("causal", True), options.get("sliding_window"), options.get("soft_cap"),
        options.get("scale", depth**-0.5), options.get("dropout_rate", 0.0),
    )  # fmt: skip
    seed = jnp.int32(options["dropout_seed"]) if whole.dropout_rate else None
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda *a: flash_attention_reference(*a, ids, whole, seed))
        truth, pull = jax.vjp(exact, *(a.astype(jnp.float32) for a in (q, k, v)))
        expected = *truth, *pull((dout.astype(jnp.float32), jnp.zeros_like(truth[1])))
    for what, actual, right in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        assert np.isfinite(np.asarray(actual, np.float32)).all(), what
        if name == "one token" and what in ("dq", "dk"):
            assert np.abs(np.asarray(actual, np.float32)).max() < 1e-1  # softmax of one logit has no slope
            continue
        assert error(actual, right) < BOUNDS[dtype], what
        if ids is not None:
            actual = actual.swapaxes(1, 2) if actual.ndim == 3 else actual
            assert not np.asarray(actual, np.float32)[np.asarray(ids) == 0].any(), what


@pytest.mark.parametrize("implementation", ["triton", None])
def test_gradient_of_lse_too(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 300, n, 64)), jnp.float16) for n in (4, 2, 2))
    cotangents = (
        jnp.asarray(rng.normal(size=q.shape), jnp.float16),
        jnp.asarray(rng.normal(size=(1, 4, 300)), jnp.float32),
    )

    def both(*qkv):
        return flash_attention(*qkv, return_lse=True, implementation=implementation)

    grads = jax.jit(lambda c, *qkv: jax.vjp(both, *qkv)[1](c))(cotangents, q, k, v)
    with jax.default_matmul_precision("highest"):
        reference = lambda *qkv: flash_attention_reference(*qkv, None, Options(True, None, None, 0.125))  # noqa: E731
        exact = jax.vjp(reference, *(a.astype(jnp.float32) for a in (q, k, v)))[1](
            (cotangents[0].astype(jnp.float32), cotangents[1])
        )
    for actual, right in zip(grads, exact, strict=True):
        assert error(actual, right) < BOUNDS["float16"]


@pytest.mark.parametrize(
    ("implementation", "length", "options"),
    [
        ("triton", 1024, {}),
        ("mosaic", 4096, {"deterministic": True}),
        ("mosaic", 1024, {"segments": True}),
        (None, 8192, {"deterministic": True}),
        (None, 1000, {"deterministic": True, "segments": True}),
    ],
)
def test_the_same_bits_every_time(implementation, length, options):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, n, 128)), jnp.bfloat16) for n in (8, 2, 2))
    ids = 1 + jnp.arange(length, dtype=jnp.int32)[None] // 300 if options.get("segments") else None
    attend = partial(
        flash_attention,
        segment_ids=ids,
        deterministic=options.get("deterministic", False),
        implementation=implementation,
    )
    grads = jax.jit(jax.value_and_grad(lambda *a: (attend(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2)))
    first = grads(q, k, v)
    for _ in range(3):
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, grads(q, k, v))))
