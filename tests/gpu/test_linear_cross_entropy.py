"""On a GPU: loss and gradients of both implementations against float64, rows without labels included."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy

pytestmark = pytest.mark.gpu
chunks = importlib.import_module("pallas_kernels.linear_cross_entropy.chunks")

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"soft_cap": 3.0},
    "smooth": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.01},
    "all": {"soft_cap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01},
}
SIZES = [(1, 8, 5), (43, 32, 97), (300, 64, 507), (261, 96, 4096), (200, 64, 20004)]


def inputs(sizes: tuple[int, ...], dtype: str, kept: float = 0.7) -> list[jax.Array]:
    """hidden, head, labels, cotangents."""
    rows, width, words = sizes
    rng = np.random.default_rng(sum(sizes))
    labels = np.where(rng.random(rows) < kept, rng.integers(0, words, size=rows), -100)
    labels[0] = words - 1
    hidden, weight = rng.normal(size=(rows, width)), rng.normal(size=(words, width)) * 2 / width**0.5
    cotangents = jnp.asarray(rng.normal(size=rows), jnp.float32)
    return [jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), jnp.asarray(labels, jnp.int32), cotangents]


def exact(
    hidden: Any,
    weight: Any,
    labels: Any,
    g: Any,
    soft_cap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> list[np.ndarray]:
    """Losses and both gradients in float64, on the host."""
    hidden, weight, g, labels = *(np.asarray(a, np.float64) for a in (hidden, weight, g)), np.asarray(labels)
    logits = hidden @ weight.T
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    highest = logits.max(1, keepdims=True)
    lse = highest + np.log(np.exp(logits - highest).sum(1, keepdims=True))
    target = (1 - label_smoothing) * (np.arange(len(weight)) == labels[:, None]) + label_smoothing / len(weight)
    losses = (lse - (target * logits).sum(1, keepdims=True) + z_loss * lse**2)[:, 0]
    ds = (1 + 2 * z_loss * lse) * np.exp(logits - lse) - target
    if soft_cap:
        ds *= 1 - (logits / soft_cap) ** 2
    labelled = labels != -100
    ds *= (g * labelled)[:, None]
    return [losses * labelled, ds @ weight, ds.T @ hidden]


def norm_ratio(ours: Any, reference: np.ndarray) -> float:
    ours = np.asarray(ours, np.float64)
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


CASES = [(sizes, dtype, "all", "triton") for sizes in SIZES for dtype in BOUNDS]
CASES += [((300, 64, 507), "bfloat16", name, "triton") for name in OPTIONS if name != "all"]
CASES += [((300, 64, 507), dtype, "all", "xla") for dtype in BOUNDS]


@pytest.mark.parametrize(("sizes", "dtype", "name", "implementation"), CASES)
def test_agrees_with_float64(monkeypatch, sizes, dtype, name, implementation) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * sizes[2] * 70)
    hidden, weight, labels, g = inputs(sizes, dtype)
    options = OPTIONS[name]

    def losses(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, weight, labels, implementation=implementation, **options)

    @jax.jit
    def run(hidden: jax.Array, weight: jax.Array) -> Any:
        alone = losses(hidden, weight)
        frozen, pull_frozen = jax.vjp(lambda hidden: losses(hidden, weight), hidden)
        trained, pull = jax.vjp(losses, hidden, weight)
        return (alone, frozen, trained), (*pull_frozen(g), pull(g)[0]), pull(g)[1]

    all_losses, all_dx, dweight = run(hidden, weight)
    expected = exact(hidden, weight, labels, g, **options)
    for ours in all_losses:
        assert norm_ratio(ours, expected[0]) < 1e-5
    for ours in all_dx:
        assert norm_ratio(ours, expected[1]) < BOUNDS[dtype]
        assert not np.asarray(ours, np.float32)[np.asarray(labels) == -100].any()
    assert norm_ratio(dweight, expected[2]) < BOUNDS[dtype]


def test_rows_without_labels_never_count(monkeypatch) -> None:
    """NaN in them reaches nothing; with no label at all everything is 0; a label that is no word is NaN in its row."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 507 * 64)
    hidden, weight, labels, g = inputs((300, 64, 507), "bfloat16", 0.4)
    ignored = np.asarray(labels) == -100
    poisoned = jnp.where(ignored[:, None], jnp.bfloat16(jnp.nan), hidden)

    @jax.jit
    def run(hidden: jax.Array, labels: jax.Array) -> Any:
        losses, pull = jax.vjp(lambda h, w: linear_cross_entropy(h, w, labels), hidden, weight)
        frozen = jax.grad(lambda h: linear_cross_entropy(h, weight, labels) @ g)(hidden)
        return losses, frozen, *pull(g)

    for clean, dirty in zip(run(hidden, labels), run(poisoned, labels), strict=True):
        np.testing.assert_array_equal(np.asarray(clean, np.float32), np.asarray(dirty, np.float32))
    for nothing in run(poisoned, jnp.full_like(labels, -100)):
        assert not np.asarray(nothing, np.float32).any()
    losses, dx, *_ = run(hidden, labels.at[5].set(507).at[9].set(-1))
    for bad in (losses, np.asarray(dx, np.float32).sum(1)):
        assert np.flatnonzero(np.isnan(bad)).tolist() == [5, 9]


@pytest.mark.parametrize("axis_name", [None, "axis"])
@pytest.mark.parametrize("checked", [True, False])
def test_under_shard_map(axis_name: str | None, checked: bool) -> None:
    """Rows divided, or words, over the one device there is: the kernel's results keep the axes over which they vary."""
    hidden, weight, labels, g = inputs((300, 64, 507), "bfloat16")
    mesh = jax.make_mesh((1,), ("axis",), axis_types=(jax.sharding.AxisType.Auto,))
    divided, whole = jax.sharding.PartitionSpec("axis"), jax.sharding.PartitionSpec()
    rows, words = (divided, whole) if axis_name is None else (whole, divided)

    def gradients(hidden: jax.Array, weight: jax.Array, labels: jax.Array, axis_name: str | None = axis_name) -> Any:
        loss = lambda h, w: linear_cross_entropy(h, w, labels, axis_name=axis_name) @ g  # noqa: E731
        trained = (jax.grad(loss, argnums=1)(hidden, weight),) if words == divided else ()
        return jax.grad(loss)(hidden, weight), *trained

    in_specs, out_specs = (rows, words, rows), (rows, words)[: 1 + (words == divided)]
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=checked)
    expected = jax.jit(lambda *arrays: gradients(*arrays, axis_name=None))(hidden, weight, labels)
    for ours, alone in zip(jax.jit(sharded)(hidden, weight, labels), expected, strict=True):
        assert norm_ratio(ours, np.asarray(alone, np.float64)) < 1e-2
