"""Attention against its math in float64 over masks, caps and groupings; padding; what backward keeps; cuDNN."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import flash_attention as public_flash_attention
from pallas_kernels.flash_attention import (
    Options,
    attention_forward,
    attention_part_backward,
    flash_attention,
    flash_attention_reference,
    segment_metadata,
)
from pallas_kernels.flash_attention.dropout import kept

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# name: (B, S, N, K, D), options, segment lengths per row (what is left of a row is padding)
CASES = {
    "one token": ((1, 1, 1, 1, 8), {}, None),
    "causal, odd sizes": ((2, 23, 6, 2, 5), {}, None),
    "one kv head, scale": ((1, 16, 4, 1, 8), {"scale": 0.9}, None),
    "all see all": ((1, 19, 2, 2, 8), {"causal": False}, None),
    "window": ((1, 33, 4, 2, 8), {"sliding_window": 7}, None),
    "cap": ((2, 12, 2, 1, 16), {"soft_cap": 1.5, "scale": 1.0}, None),
    "packed": ((2, 24, 4, 2, 8), {}, [(5, 1, 18), (9, 7)]),
    "packed, all see all": ((2, 17, 2, 1, 8), {"causal": False}, [(8, 9), (4,)]),
    "every option": (
        (2, 32, 4, 2, 8),
        {"sliding_window": 5, "soft_cap": 2.0, "scale": 0.7, "dropout_rate": 0.3, "dropout_seed": 11},
        [(20, 8), ()],
    ),
}


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def segment_ids(lengths, size):
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, size - len(row))) for row in ids], jnp.int32)


def inputs(sizes, dtype):
    """q, k, v and cotangents of the output and of the log-sum-exp."""
    batch, length, heads, kv_heads, depth = sizes
    rng = np.random.default_rng(sum(sizes))
    narrow, wide = (batch, length, kv_heads, depth), (batch, length, heads, depth)
    shapes = [wide, narrow, narrow, wide, (batch, heads, length)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return arrays[:3], (arrays[3], arrays[4].astype(jnp.float32))


def forward_and_backward(function, arrays, cotangents):
    @jax.jit
    def run(arrays, cotangents):
        outputs, pull = jax.vjp(function, *arrays)
        return *outputs, *pull(cotangents)

    return run(arrays, cotangents)


def in_float64(arrays, cotangents, ids, options):
    """Autodiff of the reference."""
    seed = jnp.int32(options["dropout_seed"]) if "dropout_seed" in options else None
    options = Options(
        options.get("causal", True),
        options.get("sliding_window"),
        options.get("soft_cap"),
        options.get("scale", arrays[0].shape[-1] ** -0.5),
        options.get("dropout_rate", 0.0),
    )
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (arrays, cotangents))
        return forward_and_backward(
            lambda *qkv: flash_attention_reference(*qkv, ids, options, seed), arrays, cotangents
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES]
    + [(name, dtype) for name in ("causal, odd sizes", "every option") for dtype in ("bfloat16", "float16")],
)
def test_values_and_gradients(name, dtype):
    sizes, options, lengths = CASES[name]
    arrays, cotangents = inputs(sizes, dtype)
    ids = None if lengths is None else segment_ids(lengths, sizes[1])
    results = forward_and_backward(
        lambda *qkv: flash_attention(*qkv, segment_ids=ids, return_lse=True, **options), arrays, cotangents
    )
    assert [r.dtype for r in results] == [dtype, jnp.float32, dtype, dtype, dtype]
    if name == "one token":  # softmax of one logit: what reaches q and k is lse's gradient alone
        assert error(results[0], arrays[2]) < BOUNDS[dtype]
    for result, truth in zip(results, in_float64(arrays, cotangents, ids, options), strict=True):
        assert error(result, truth) < BOUNDS[dtype]


def test_parts_make_a_whole():
    """Causal attention of packed rows from what early and late queries see of early and late keys."""
    sizes = (2, 32, 4, 2, 8)
    (q, k, v), (g, _) = inputs(sizes, "float32")
    ids = segment_ids([(20, 9), (11, 3, 18)], 32)
    out, lse, *grads = in_float64((q, k, v), (g, jnp.zeros((2, 4, 32))), ids, {})
    early, late = (slice(0, 16), slice(16, 32))

    @jax.jit
    def parts(q, k, v, g):
        made = []
        for rows, columns in ((late, early), (late, late)):
            segments = segment_metadata(ids[:, rows], ids[:, columns])
            options = {"causal": columns == late, "segment_ids": segments}
            arrays = q[:, rows], k[:, columns], v[:, columns]
            part = attention_forward(*arrays, **options)[1]
            whole = jnp.float32(out[:, rows]), jnp.float32(lse[:, :, rows])
            made.append((part.out, part.lse, attention_part_backward(*arrays, *whole, g[:, rows], **options)))
        return made

    (o1, lse1, grads1), (o2, lse2, grads2) = parts(q, k, v, g)
    assert not np.asarray(o1)[0, 4:].any()  # of a document that begins late, and of padding
    assert not np.asarray(lse1)[0, :, 4:].any()
    seen = np.asarray(ids[:, late] == ids[:, 15:16])[:, None]
    weight = np.where(seen, np.exp(np.asarray(lse1) - np.asarray(lse)[:, :, late]), 0)
    rest = np.exp(np.asarray(lse2) - np.asarray(lse)[:, :, late])
    merged = weight.swapaxes(1, 2)[..., None] * o1 + rest.swapaxes(1, 2)[..., None] * o2
    assert error(merged, out[:, late]) < 1e-5
    assert error(grads1[0] + grads2[0], grads[0][:, late]) < 1e-5
    for mine, truth in zip(grads2[1:], grads[1:], strict=True):
        assert error(mine, truth[:, late]) < 1e-5


def test_against_loops():
    """Each query's visible keys listed one by one, in numpy."""
    (q, k, v), _ = inputs((2, 14, 4, 2, 8), "float32")
    ids = segment_ids([(6, 7), (14,)], 14)
    options = {"sliding_window": 4, "soft_cap": 3.0, "scale": 0.7}
    run = jax.jit(lambda *qkv: flash_attention(*qkv, segment_ids=ids, return_lse=True, **options))
    actual, actual_lse = run(q, k, v)
    q, k, v, ids = (np.asarray(array) for array in (q, k, v, ids))
    out, lse = np.zeros(q.shape), np.zeros((2, 4, 14))
    for b, i, n in np.ndindex(2, 14, 4):
        seen = [j for j in range(14) if j <= i and i - j < 4 and ids[b, i] == ids[b, j] != 0]
        if seen:
            weights = [np.exp(3 * np.tanh(0.7 * np.dot(q[b, i, n], k[b, j, n // 2]) / 3)) for j in seen]
            out[b, i, n] = sum(w * v[b, j, n // 2] for w, j in zip(weights, seen, strict=True))
            out[b, i, n] /= sum(weights)
            lse[b, n, i] = np.log(sum(weights))
    np.testing.assert_allclose(actual, out, atol=1e-5)
    np.testing.assert_allclose(actual_lse, lse, atol=1e-5)


def test_gradient_is_the_slope():
    """Central differences of causal attention written out in numpy."""
    rng = np.random.default_rng(0)
    arrays, directions = rng.normal(size=(2, 3, 1, 9, 2, 8))
    g = rng.normal(size=(1, 9, 2, 8))

    def loss(t):
        q, k, v = arrays + t * directions
        weights = np.exp(np.einsum("bqnd,bsnd->bnqs", q, k) / np.sqrt(8)) * np.tri(9)
        return np.sum(g * np.einsum("bnqs,bsnd->bqnd", weights / weights.sum(-1, keepdims=True), v))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    arrays, g = arrays.astype(np.float32), g.astype(np.float32)
    grads = jax.jit(jax.grad(lambda *qkv: (flash_attention(*qkv) * g).sum(), (0, 1, 2)))(*arrays)
    assert np.sum(np.asarray(grads) * directions) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_padding_is_zero_in_both_passes(dtype):
    """Also with logits whose exponentials overflow."""
    arrays, cotangents = inputs((2, 10, 2, 1, 8), dtype)
    arrays = [60 * array for array in arrays]
    ids = segment_ids([(4, 3), ()], 10)
    out, lse, *grads = forward_and_backward(
        lambda *qkv: flash_attention(*qkv, segment_ids=ids, return_lse=True), arrays, cotangents
    )
    padding = np.asarray(ids) == 0
    for array in (out, lse.swapaxes(1, 2), *grads):
        assert np.isfinite(np.asarray(array, np.float32)).all()
        assert not np.asarray(array, np.float32)[padding].any()
        assert np.asarray(array, np.float32)[~padding].any()


def test_padding_changes_nothing():
    """A row's documents give what each gives alone."""
    qkv, _ = inputs((1, 12, 2, 1, 8), "float32")
    run = jax.jit(lambda ids, *qkv: flash_attention(*qkv, segment_ids=ids))
    packed = run(segment_ids([(5, 4)], 12), *qkv)
    for begin, end in ((0, 5), (5, 9)):
        alone = run(None, *(np.asarray(array)[:, begin:end] for array in qkv))
        np.testing.assert_allclose(packed[:, begin:end], alone, atol=1e-6)


def products(jaxpr):
    """Every dot_general of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def backward_jaxpr(dtype):
    (q, k, v), (g, _) = inputs((2, 16, 6, 2, 8), dtype)
    return jax.make_jaxpr(lambda g, *qkv: jax.vjp(flash_attention, *qkv)[1](g))(g, q, k, v)


def test_keys_and_values_are_not_repeated():
    """Each product takes k or v as given, or makes their gradient."""
    found = list(products(backward_jaxpr("float32").jaxpr))
    assert len(found) == 7  # two of the forward pass, five of the backward one
    for equation in found:
        assert 2 * 16 * 2 * 8 in [v.aval.size for v in (*equation.invars, *equation.outvars)]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_precision_of_products(dtype):
    """16-bit operands stay 16-bit, sums are float32, and float32 is never tf32."""
    for equation in products(backward_jaxpr(dtype).jaxpr):
        assert {v.aval.dtype.name for v in equation.invars} == {dtype}
        assert equation.params["preferred_element_type"] == jnp.float32
        if dtype == "float32":
            assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_keeps_inputs_output_and_lse():
    (q, k, v), _ = inputs((2, 16, 6, 2, 8), "bfloat16")
    ids = segment_ids([(9, 3), (16,)], 16)
    kept = jax.tree.leaves(jax.vjp(lambda *qkv: flash_attention(*qkv, segment_ids=ids), q, k, v)[1])
    expected = [(q.shape, "bfloat16")] * 2 + [(k.shape, "bfloat16")] * 2 + [(ids.shape, "int32")]
    expected.append(((2, 6, 16), "float32"))
    assert sorted((a.shape, a.dtype.name) for a in kept) == sorted(expected)


def test_dropout_drops_each_weight_by_itself():
    """As often as said, and neighbours of any kind no oftener together than chance has it: keys, queries, heads, seeds."""
    rate, size = 0.3, 128
    masks = np.stack([kept(jnp.int32(seed), 2, 3, size, rate) for seed in (0, 1, -(2**31), 2**31 - 1)]).astype(float)
    assert abs(masks.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / masks.size) ** 0.5
    noise = masks - masks.mean()
    for axis in range(noise.ndim):  # of seeds, rows, heads, queries and keys
        for distance in (1, 2, 64):
            if distance < noise.shape[axis]:
                products = noise * np.roll(noise, distance, axis)
                assert abs(products.mean()) < 5 * rate * (1 - rate) / noise.size**0.5, (axis, distance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 15, 2, 8), "v": (2, 15, 2, 8)}, "q has 16 positions and k 15: they must be equal"),
        ({"k": (2, 16, 4, 8), "v": (2, 16, 4, 8)}, "6 query heads must be a multiple of the 4 key/value heads"),
        ({"v": (2, 16, 2, 4)}, r"v.shape=\(2, 16, 2, 4\) must be"),
        ({"segment_ids": jnp.ones((2, 15), jnp.int32)}, r"segment_ids.shape=\(2, 15\) must be \(2, 16\)"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"sliding_window": 4, "causal": False}, "needs causal=True, not causal=False"),
        ({"sliding_window": 2.5}, "sliding_window=2.5 must be .* a whole number"),
        ({"sliding_window": 1 << 31}, "must be .* below 2.31"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"soft_cap": float("inf")}, "soft_cap=inf must be positive and finite"),
        ({"scale": float("nan")}, "scale=nan must be finite"),
        ({"q": (2, 0, 6, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, "must hold at least one row, position"),
        ({"q": (2, 16, 6, 0), "k": (2, 16, 2, 0), "v": (2, 16, 2, 0)}, "at least one .* dimension"),
        ({"k": (2, 16, 0, 8), "v": (2, 16, 0, 8)}, r"k.shape=\(2, 16, 0, 8\) must hold"),
        ({"q": jnp.ones((2, 16, 6, 8), jnp.int32)}, "takes floating-point arrays, but q is int32"),
        ({"segment_ids": jnp.ones((2, 16))}, "segment_ids.dtype=float32 must be an integer type"),
        ({"dropout_rate": 0.1, "dropout_seed": 1.5}, "dropout_seed must be one integer, not 1.5"),
        ({"dropout_rate": 0.1, "dropout_seed": jnp.zeros(2, jnp.int32)}, "dropout_seed must be one integer"),
        (
            {"implementation": "cuda"},
            "flash_attention has no implementation='cuda'; use one of mosaic, cudnn, triton, xla",
        ),
        ({"implementation": "triton"}, "needs an NVIDIA GPU, and jax runs on another device; use xla, or None"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and less than 1"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 needs a dropout_seed"),
        ({"implementation": "cudnn"}, "needs an NVIDIA GPU .*; use xla, or None"),
    ],
)
def test_refuses(change, message):
    arguments = {"q": (2, 16, 6, 8), "k": (2, 16, 2, 8), "v": (2, 16, 2, 8)} | change
    arguments = {key: jnp.ones(a, jnp.bfloat16) if isinstance(a, tuple) else a for key, a in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attention(**arguments)


def test_refuses_mixed_dtypes():
    (q, k, v), _ = inputs((2, 16, 6, 2, 8), "bfloat16")
    with pytest.raises(ValueError, match=r"q.dtype=dtype\('float32'\), k.dtype=dtype\(bfloat16\) .* the same"):
        flash_attention(q.astype(jnp.float32), k, v)


@pytest.fixture
def hopper(monkeypatch):
    """This process believes its default device an H100 with cuDNN 9.10; nothing can run, but trace and lower it can."""
    for name in ("cudnn", "triton", "mosaic_common"):
        module = importlib.import_module(f"pallas_kernels.flash_attention.{name}")
        monkeypatch.setattr(module, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "depth", "options", "message"),
    [
        ("float32", 64, {}, "takes float16 or bfloat16, not float32; use xla"),
        ("bfloat16", 64, {"soft_cap": 30.0}, "does not cap logits, and soft_cap=30.0"),
        ("bfloat16", 64, {"return_lse": True}, "return_lse=True"),
        ("bfloat16", 64, {"deterministic": True}, "no fixed order, and deterministic=True"),
        ("bfloat16", 60, {}, "head size 60 is not a multiple of 8 up to 256"),
        ("bfloat16", 264, {}, "head size 264 is not"),
        ("bfloat16", 64, {"segment_ids": jnp.ones((1, 17), jnp.int32)}, "an even number of positions, not 17"),
    ],
)
def test_cudnn_refuses_and_is_not_chosen(dtype, depth, options, message):
    q = jnp.ones((1, 17, 2, depth), dtype)
    with pytest.raises(ValueError, match=f"cannot run with implementation='cudnn': .*{message}"):
        flash_attention(q, q, q, implementation="cudnn", **options)
    jax.eval_shape(lambda q: flash_attention(q, q, q, **options), q)
    assert "custom_vjp" in str(jax.make_jaxpr(lambda q: flash_attention(q, q, q, **options))(q))


@pytest.mark.usefixtures("hopper")
def test_one_position_is_not_for_cudnn():
    q = jnp.ones((4, 1, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="attention of one position"):
        flash_attention(q, q, q, implementation="cudnn")


def lowered_for_cuda(function, *arrays) -> str:
    device = AbstractDevice("NVIDIA H100", 132, "cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("hopper")
def test_cudnn_lowers_for_cuda():
    """In both passes, with a causal order and no mask where there are no segments."""
    (q, k, v), (g, _) = inputs((1, 32, 4, 2, 64), "bfloat16")
    ids = segment_ids([(20, 5)], 32)

    def text(**options):
        def run(g, *qkv):
            out, pull = jax.vjp(lambda *qkv: flash_attention(*qkv, implementation="cudnn", **options), *qkv)
            return out, pull(g)

        return lowered_for_cuda(run, g, q, k, v)

    plain, packed = text(sliding_window=7), text(segment_ids=ids, sliding_window=7)
    for call in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert call in plain
    for call in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        assert call in packed
    assert "sliding_window_length\\22: 7" in plain
    assert "sliding_window_length\\22: 0" in packed
    assert "1x1x32x32xi1" not in plain


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("length", "depth", "options", "forward", "backward"),
    [
        (256, 128, {}, "mosaic", "mosaic"),
        (8192, 128, {}, "mosaic", "cudnn"),
        (8192, 128, {"segment_ids": True}, "mosaic", "mosaic"),
        (8192, 128, {"return_lse": True}, "mosaic", "mosaic"),
        (8192, 128, {"deterministic": True}, "mosaic", "mosaic"),
        (256, 96, {"deterministic": True}, "triton", "triton"),
        (256, 256, {}, "mosaic", "cudnn"),
        (256, 256, {"segment_ids": True}, "mosaic", "triton"),
        (256, 96, {}, "cudnn", "cudnn"),
        (255, 64, {"soft_cap": 2.0}, "triton", "triton"),
        (256, 64, {"dropout_rate": 0.1, "dropout_seed": 1}, "triton", "triton"),
        (256, 300, {}, "xla", "xla"),
    ],
)
def test_chooses_by_shape_and_options(monkeypatch, length, depth, options, forward, backward):
    module = importlib.import_module("pallas_kernels.flash_attention.op")
    ran = []

    def record(name, results):
        def run(*arrays, **_):
            ran.append(name)
            q, k, v = arrays[:3]
            return (q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))) if results == 2 else (q, k, v)

        return run

    for name in ("mosaic", "cudnn", "triton", "xla"):
        monkeypatch.setattr(getattr(module, name), "forward", record(name, 2))
        where = module.mosaic_backward if name == "mosaic" else getattr(module, name)
        monkeypatch.setattr(where, "backward", record(name, 3))
    monkeypatch.setattr(module.triton, "triton_obstacle", lambda: None)
    q = jnp.ones((1, length, 1, depth), jnp.bfloat16)
    if "segment_ids" in options:
        options = options | {"segment_ids": jnp.ones((1, length), jnp.int32)}
    jax.vjp(lambda q: jax.tree.leaves(flash_attention(q, q, q, **options))[0], q)[1](q)
    assert ran == [forward, backward]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 7, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("lengths", [None, [(20, 5), (32,)]], ids=["whole", "packed"])
def test_cudnn_is_asked_for_the_same(monkeypatch, options, lengths):
    """What goes to the function under jax.nn's means the same there: jax's own XLA code agrees with ours."""
    (q, k, v), _ = inputs((2, 32, 4, 2, 8), "bfloat16")
    ids = None if lengths is None else segment_ids(lengths, 32)
    asked = []

    def on_the_cpu(q, k, v, *, mask, scale, mask_type, sliding_window_length, return_residual):
        asked.append(return_residual)
        window = None if sliding_window_length is None else (sliding_window_length - 1, 0)
        causal = mask_type == fused_attention_stablehlo.MaskType.CAUSAL
        with jax.numpy_dtype_promotion("standard"):
            out = jax.nn.dot_product_attention(
                q, k, v, mask=mask, scale=scale, is_causal=causal, local_window_size=window, implementation="xla"
            )
        return out, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", on_the_cpu)
    theirs = public_flash_attention(q, k, v, segment_ids=ids, implementation="cudnn", **options)
    ours = public_flash_attention(q, k, v, segment_ids=ids, implementation="xla", **options)
    assert asked == [True]
    assert error(theirs, ours) < BOUNDS["bfloat16"]
