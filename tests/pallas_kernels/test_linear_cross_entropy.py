"""The loss against its math in float64, with frozen and trained heads; what is computed when, and what is kept."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import Options, linear_cross_entropy, linear_cross_entropy_reference

chunks = importlib.import_module("pallas_kernels.linear_cross_entropy.chunks")

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
OPTIONS = {
    "plain": {},
    "cap": {"soft_cap": 2.0},
    "smooth": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.05},
    "all": {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 0.02, "ignore_index": 0},
}
IN_CHUNKS = (43, 32, 97)  # 6 chunks of 8 rows under `small_chunks`, the last one part full


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 97 * 8)


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def inputs(sizes, dtype, weight_dtype=None, ignore_index=-100):
    """hidden, weight, labels with every fifth ignored, a cotangent."""
    rows, width, vocabulary = sizes
    rng = np.random.default_rng(sum(sizes))
    labels = np.where(np.arange(rows) % 5 == 3, ignore_index, rng.integers(0, vocabulary, size=rows))
    return (
        jnp.asarray(rng.normal(size=(rows, width)), dtype),
        jnp.asarray(0.5 * rng.normal(size=(vocabulary, width)), weight_dtype or dtype),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(rng.normal(size=rows), jnp.float32),
    )


def differentiated(function, hidden, weight, labels, g, trained=True):
    """The losses and the gradient of hidden, and with a trained head that of the weight."""

    @jax.jit
    def run(hidden, weight, labels, g):
        if trained:
            losses, pull = jax.vjp(lambda hidden, weight: function(hidden, weight, labels), hidden, weight)
        else:
            losses, pull = jax.vjp(lambda hidden: function(hidden, weight, labels), hidden)
        return losses, *pull(g)

    return run(hidden, weight, labels, g)


def in_float64(hidden, weight, labels, g, options):
    """Autodiff of the reference, on the weight as the op uses it."""
    weight = weight.astype(hidden.dtype)
    with jax.enable_x64(True):
        hidden, weight, g = (jnp.asarray(np.asarray(array, np.float64)) for array in (hidden, weight, g))
        reference = lambda *arrays: linear_cross_entropy_reference(*arrays, Options(**options))  # noqa: E731
        return differentiated(reference, hidden, weight, labels, g)


@pytest.mark.parametrize(
    ("sizes", "name", "dtype"),
    [(IN_CHUNKS, name, "float32") for name in OPTIONS]
    + [((1, 8, 5), "plain", "float32"), ((8, 5, 97), "all", "float32"), ((13, 3, 501), "plain", "float32")]
    + [(IN_CHUNKS, name, dtype) for name in ("plain", "all") for dtype in ("bfloat16", "float16")],
)
def test_values_and_gradients(sizes, name, dtype):
    options = OPTIONS[name]
    arrays = inputs(sizes, dtype, ignore_index=options.get("ignore_index", -100))
    function = lambda *arrays: linear_cross_entropy(*arrays, **options)  # noqa: E731
    truth = in_float64(*arrays, options)
    for trained in (False, True):
        results = differentiated(function, *arrays, trained=trained)
        assert [r.dtype for r in results] == [jnp.float32, dtype, dtype][: len(results)]
        for result, expected in zip(results, truth, strict=False):
            assert error(result, expected) < BOUNDS[dtype]
        ignored = np.asarray(arrays[2]) == options.get("ignore_index", -100)
        assert not np.asarray(results[0])[ignored].any()
        assert not np.asarray(results[1], np.float32)[ignored].any()


def test_against_softmax():
    """The definition in numpy: probabilities, smoothed targets, squared log of the sum of exponentials."""
    hidden, weight, labels, _ = inputs((9, 8, 31), "float32")
    losses = linear_cross_entropy(hidden, weight, labels, soft_cap=2.5, label_smoothing=0.3, z_loss=0.1)
    logits = 2.5 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T / 2.5)
    total = np.exp(logits).sum(1, keepdims=True)
    target = 0.7 * (np.arange(31) == np.asarray(labels)[:, None]) + 0.3 / 31
    expected = -(target * np.log(np.exp(logits) / total)).sum(1) + 0.1 * np.log(total[:, 0]) ** 2
    np.testing.assert_allclose(losses, np.where(np.asarray(labels) == -100, 0, expected), rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_gradient_is_the_slope(trained):
    """Central differences of cross entropy written out in numpy."""
    rng = np.random.default_rng(0)
    hidden, weight, along, wlong = (rng.normal(size=s) for s in ((20, 8), (97, 8), (20, 8), (97, 8)))
    labels, g = rng.integers(0, 97, size=20).astype(np.int32), rng.normal(size=20)
    wlong *= trained

    def loss(t):
        logits = (hidden + t * along) @ (weight + t * wlong).T
        return np.sum(g * (np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels]))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    arrays = [array.astype(np.float32) for array in (hidden, weight)]
    _, *grads = differentiated(linear_cross_entropy, *arrays, labels, g.astype(np.float32), trained=trained)
    assert sum(np.sum(d * a) for d, a in zip(grads, (along, wlong), strict=False)) == pytest.approx(slope, rel=1e-4)


def test_master_weight():
    """A float32 head is used in hidden's dtype and gets a gradient that was never rounded to 16 bits."""
    arrays = inputs((600, 16, 97), "bfloat16", "float32")
    losses, _, dweight = differentiated(linear_cross_entropy, *arrays)
    truth = in_float64(*arrays, {})
    assert dweight.dtype == jnp.float32
    assert error(losses, truth[0]) < 1e-5
    assert error(dweight, truth[2]) < 3e-3
    assert error(dweight.astype(jnp.bfloat16), dweight) > 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_small_cotangents_in_float16(trained):
    """A mean over a million tokens: 1e-6 times a probability is nothing in float16."""
    arrays = inputs(IN_CHUNKS, "float16", "float32" if trained else None)
    arrays = (*arrays[:3], 1e-6 * arrays[3])
    _, *grads = differentiated(linear_cross_entropy, *arrays, trained=trained)
    _, *truth = in_float64(*arrays, {})
    if trained:
        assert error(grads[1], truth[1]) < BOUNDS["float16"]
    assert np.abs(np.asarray(grads[0], np.float64) - np.asarray(truth[0])).max() < 6e-8  # float16's smallest number


def test_labels_outside_the_vocabulary():
    """They make NaN, which a trainer sees, and only in their own rows."""
    hidden, weight, labels, g = inputs(IN_CHUNKS, "float32")
    labels = labels.at[7].set(97).at[21].set(-1)
    for trained in (False, True):
        losses, dx, *_ = differentiated(linear_cross_entropy, hidden, weight, labels, g, trained=trained)
        assert np.flatnonzero(np.isnan(losses)).tolist() == [7, 21]
        assert np.flatnonzero(np.isnan(dx).any(1)).tolist() == [7, 21]


def test_labels_of_a_narrow_type():
    """Which holds neither the number of words nor the label that is ignored, 156 in 8 bits without a sign."""
    hidden, weight, _, _ = inputs((5, 8, 501), "float32")
    labels = jnp.asarray([0, 7, 100, 156, 255], jnp.uint8)
    losses, expected = (linear_cross_entropy(hidden, weight, each) for each in (labels, labels.astype(jnp.int32)))
    np.testing.assert_array_equal(losses, expected)
    assert np.isfinite(losses).all()
    assert np.all(losses)


def test_nothing_to_learn():
    """No rows, no labelled row, cotangents of zero."""
    hidden, weight, labels, g = inputs(IN_CHUNKS, "float32")
    nothing = differentiated(linear_cross_entropy, hidden[:0], weight, labels[:0], g[:0])
    ignored = differentiated(linear_cross_entropy, hidden, weight, jnp.full_like(labels, -100), g)
    unused = differentiated(linear_cross_entropy, hidden, weight, labels, 0 * g)
    assert [r.shape for r in nothing] == [(0,), (0, 32), (97, 32)]
    for array in (*nothing, *ignored, *unused[1:]):
        assert not array.any()


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(dtype, mode, **options):
    """The equations of a call that is not differentiated, or is with a frozen or a trained head."""
    arrays = inputs(IN_CHUNKS, dtype)
    function = lambda *arrays: linear_cross_entropy(*arrays, **options)  # noqa: E731
    if mode == "alone":
        return list(equations(jax.make_jaxpr(function)(*arrays[:3]).jaxpr))
    run = lambda *arrays: differentiated(function, *arrays, trained=mode == "trained")  # noqa: E731
    return list(equations(jax.make_jaxpr(run)(*arrays).jaxpr))


@pytest.mark.parametrize(("mode", "products"), [("alone", 1), ("frozen", 2), ("trained", 4)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_what_is_computed(mode, products, dtype):
    """The fewest products, on operands of hidden's dtype with float32 sums; logits of one chunk at a time."""
    found = traced(dtype, mode, soft_cap=2.0, label_smoothing=0.1, z_loss=0.1)
    dots = [equation for equation in found if equation.primitive.name == "dot_general"]
    assert len(dots) == products
    for dot in dots:
        assert {v.aval.dtype.name for v in dot.invars} == {dtype}
        assert dot.params["preferred_element_type"] == jnp.float32
        assert dot.params["precision"] == ((jax.lax.Precision.HIGHEST,) * 2 if dtype == "float32" else None)
    shapes = {v.aval.shape for equation in found for v in equation.outvars}
    assert max(np.prod(shape) for shape in shapes if 97 in shape and shape != (97, 32)) == 8 * 97


def test_what_is_kept():
    hidden, weight, labels, _ = inputs(IN_CHUNKS, "bfloat16")
    frozen = jax.vjp(lambda hidden: linear_cross_entropy(hidden, weight, labels), hidden)[1]
    trained = jax.vjp(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), hidden, weight)[1]
    shapes = [[(a.shape, a.dtype.name) for a in jax.tree.leaves(pull)] for pull in (frozen, trained)]
    assert shapes[0] == [((43, 32), "bfloat16")]
    assert sorted(shapes[1]) == [((43,), "float32"), ((43,), "int32"), ((43, 32), "bfloat16"), ((97, 32), "bfloat16")]


def test_frozen_inside_a_larger_function():
    """The head is known to be frozen through jit, a cast, a scan and checkpointing."""
    hidden, weight, labels, _ = inputs(IN_CHUNKS, "float32")

    @jax.jit
    def inner(scale, weight):
        return linear_cross_entropy(hidden * scale, weight.astype(jnp.float32), labels).sum()

    def loss(scale):
        body = lambda total, _: (total + jax.checkpoint(inner)(scale, weight), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), length=2)[0]

    found = equations(jax.make_jaxpr(jax.grad(loss))(jnp.float32(1)).jaxpr)
    assert not [e for e in found if (97, 32) in [v.aval.shape for v in e.outvars]]


@pytest.mark.parametrize(("rows", "chunk"), [(0, 1), (1, 1), (519, 519), (1100, 640), (5000, 1024), (16384, 1024)])
def test_chunks_fit_and_are_even(monkeypatch, rows, chunk):
    """Llama 3's vocabulary: float32 logits and bfloat16 gradients of 1024 rows are 752 MiB."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 768 << 20)
    assert chunks.chunk_rows(rows, 128256, 2) == chunk
    assert 6 * 128256 * chunk <= chunks.CHUNK_BYTES


def test_under_shard_map():
    """Rows split over devices, the head's gradient summed over them."""
    hidden, weight, labels, g = inputs((48, 32, 97), "float32")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def shard(hidden, weight, labels, g):
        losses, dx, dweight = differentiated(
            linear_cross_entropy, hidden, jax.lax.pcast(weight, "data", to="varying"), labels, g
        )
        return losses, dx, jax.lax.psum(dweight, "data")

    run = jax.shard_map(shard, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=(rows, rows, whole))
    expected = differentiated(linear_cross_entropy, hidden, weight, labels, g)
    for result, truth in zip(jax.jit(run)(hidden, weight, labels, g), expected, strict=True):
        np.testing.assert_allclose(result, truth, atol=1e-5)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("trained", [False, True])
def test_words_divided_over_devices(trained, checked):
    """Every device holds some of the words; rows without labels and labels that are no word among them."""
    hidden, weight, labels, g = inputs((43, 32, 96), "float32")
    labels = labels.at[7].set(96)
    options = {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 0.02}
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    words, whole = jax.sharding.PartitionSpec("tensor"), jax.sharding.PartitionSpec()

    def shard(hidden, weight, labels, g):
        function = lambda *arrays: linear_cross_entropy(*arrays, axis_name="tensor", **options)  # noqa: E731
        return differentiated(function, hidden, weight, labels, g, trained=trained)

    out_specs = (whole, whole, words)[: 2 + trained]
    run = jax.shard_map(shard, mesh=mesh, in_specs=(whole, words, whole, whole), out_specs=out_specs, check_vma=checked)
    function = lambda *arrays: linear_cross_entropy(*arrays, **options)  # noqa: E731
    expected = differentiated(function, hidden, weight, labels, g, trained=trained)
    for result, truth in zip(jax.jit(run)(hidden, weight, labels, g), expected, strict=True):
        np.testing.assert_allclose(result, truth, atol=1e-5)


def test_words_divided_and_differentiated_from_outside():
    hidden, weight, labels, _ = inputs((43, 32, 96), "float32")
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    words, whole = jax.sharding.PartitionSpec("tensor"), jax.sharding.PartitionSpec()
    divided = jax.shard_map(
        lambda *arrays: linear_cross_entropy(*arrays, axis_name="tensor"),
        mesh=mesh,
        in_specs=(whole, words, whole),
        out_specs=whole,
    )
    gradients = [
        jax.jit(jax.grad(lambda h, w, f=f: f(h, w, labels).mean(), argnums=(0, 1)))(hidden, weight)
        for f in (divided, linear_cross_entropy)
    ]
    for ours, truth in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, truth, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_rows_without_labels_are_left_out(trained):
    """What stands in them reaches nothing, and only chunks that hold labelled rows are run."""
    hidden, weight, labels, g = inputs(IN_CHUNKS, "float32")
    labels = jnp.where(jnp.arange(43) % 3 == 1, labels, -100)
    poisoned = jnp.where((labels == -100)[:, None], jnp.nan, hidden)
    clean = differentiated(linear_cross_entropy, hidden, weight, labels, g, trained=trained)
    dirty = differentiated(linear_cross_entropy, poisoned, weight, labels, g, trained=trained)
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)

    run = []
    packing = chunks.pack(labels != -100, 8)
    chunks.for_each_chunk(packing, 8, lambda chunk, start, n: jax.debug.callback(run.append, start) or n, 0)
    jax.effects_barrier()
    assert sorted(int(start) for start in run) == [0, 8]  # 12 labelled rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.ones((97, 31))}, r"weight.shape=\(97, 31\), labels.shape=\(43,\) must be \[T, H\], \[V, H\]"),
        ({"labels": jnp.zeros(42, jnp.int32)}, r"labels.shape=\(42,\) must be"),
        ({"labels": jnp.zeros(43)}, r"labels.dtype=dtype\('float32'\) must be an integer type"),
        ({"hidden": jnp.ones((43, 32), jnp.int32)}, "takes floating-point arrays, but hidden is int32"),
        ({"weight": jnp.ones((0, 32))}, r"weight.shape=\(0, 32\) must be \[V, H\] of at least one word"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be positive"),
        ({"soft_cap": float("nan")}, "soft_cap=nan must be positive and finite"),
        ({"z_loss": float("nan")}, "z_loss=nan must be finite"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and less than 1"),
        ({"implementation": "cudnn"}, "linear_cross_entropy has no implementation='cudnn'; use one of triton, xla"),
    ],
)
def test_refuses(change, message):
    hidden, weight, labels, _ = inputs(IN_CHUNKS, "float32")
    with pytest.raises((ValueError, TypeError), match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))
