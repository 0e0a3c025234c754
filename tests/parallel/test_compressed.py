"""Sums sent as codes: close to the true ones, right in the long run, as small on the wire as they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fastjax.errors import UserError
from fastjax.parallel.compressed import (
    BLOCK,
    Owed,
    bits_of,
    decode,
    encode,
    nothing_owed,
    padded_size,
    per_device,
    sum_tree,
)
from fastjax.parallel.mesh import BATCH_AXES, make_mesh
from fastjax.parallel.traffic import sent_bytes

SHAPES = {"a": (3, 50), "b": (7, 11, 13)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
MESH = {"data": 2, "fsdp": 4}


def drawn(seed: int, devices: int = 8) -> dict[str, np.ndarray]:
    """A tree for each device, with few large values among many small ones."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_t(3, (devices, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def summing(bits: int):
    """(jitted (trees [8, ...], owed, weight) -> sums as each device has them and what is owed, owed to start with)."""
    mesh = make_mesh(**MESH)
    rows = per_device(mesh)

    def one(tree, owed, weight):
        total, owed = sum_tree(jax.tree.map(lambda x: x[0], tree), owed, weight, BATCH_AXES, bits)
        return jax.tree.map(lambda x: x[None], total), owed

    spread = jax.shard_map(
        one, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=(rows, rows), check_vma=False
    )
    return jax.jit(spread), nothing_owed(SIZE, 8, mesh)


def blocks_of(flat: np.ndarray) -> np.ndarray:
    return np.pad(flat, (0, -flat.size % (8 * BLOCK))).reshape(-1, BLOCK)


def flat(tree: dict[str, np.ndarray]) -> np.ndarray:
    """[8, SIZE]"""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(8, -1) for leaf in tree.values()], axis=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_within_a_scale_and_the_extremes_exact(bits):
    x = (
        np.random.default_rng(0).normal(size=(6, 5 * BLOCK)).astype(np.float32)
        * 10.0 ** np.arange(-30, 30, 10)[:, None]
    )
    x[2, :BLOCK] = 0
    message = encode(jnp.asarray(x), bits)
    assert (message.dtype, message.shape) == (jnp.uint8, (6, 5 * (BLOCK * bits // 8 + 2)))
    values, blocks = np.asarray(decode(message, bits)).reshape(6, 5, BLOCK), x.reshape(6, 5, BLOCK)
    furthest = np.abs(blocks).max(-1, keepdims=True)
    assert (np.abs(values - blocks) <= furthest / 2 ** (bits - 1) * (1 + 2**-8 * 2 ** (bits - 1))).all()
    at = np.abs(blocks).argmax(-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(values, at, -1), np.take_along_axis(blocks, at, -1), rtol=2**-8)
    codes = np.asarray(message)[:, : 5 * BLOCK * bits // 8]
    if bits == 4:
        assert len(np.unique(codes & 15)) == len(np.unique(codes >> 4)) == 16  # none is wasted


@pytest.mark.parametrize("bits", [4, 8])
def test_one_sum_is_within_the_error_of_its_codes(bits):
    step, owed = summing(bits)
    trees = drawn(0)
    sums, _ = step(trees, owed, jnp.float32(8))
    sums, x = flat(sums), flat(trees)
    assert (sums == sums[0]).all()  # every device decodes the same bytes
    # a scale of each device's block, and one of the sum's
    levels = 2 ** (bits - 1)
    bound = sum(np.abs(blocks_of(row)).max(1) for row in x) / levels
    bound += (np.abs(blocks_of(x.sum(0))).max(1) + bound) / levels
    error = np.abs(blocks_of(sums[0]) - blocks_of(x.sum(0))).max(1)
    assert (error <= bound * (1 + levels / 256)).all()
    assert np.linalg.norm(sums[0] - x.sum(0)) <= 3.2 / 2**bits * np.linalg.norm(x.sum(0))


def test_what_is_owed_makes_the_long_run_exact():
    step, owed = summing(4)
    total, came, alone = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    bias = drawn(99)
    nothing = owed
    for number in range(40):
        trees = {name: bias[name] + leaf for name, leaf in drawn(number).items()}
        sums, owed = step(trees, owed, jnp.float32(1))
        total, came = total + flat(trees).sum(0), came + flat(sums)[0]
        alone += flat(step(trees, nothing, jnp.float32(1))[0])[0]
    left = np.asarray(owed.sent, np.float64).sum(0) + np.asarray(owed.shared, np.float64).reshape(-1)
    np.testing.assert_allclose(came + left[:SIZE], total, atol=1e-3)  # sums and debts are the truth
    assert not left[SIZE:].any()
    # the debt is of one step, however many there were; without it errors add up
    assert np.linalg.norm(came - total) < 0.4 * np.linalg.norm(alone - total)


def test_what_is_owed_is_paid_by_the_weight_of_a_step():
    step, owed = summing(4)
    trees = drawn(1)
    _, light = step(trees, owed, jnp.float32(1))
    _, heavy = step({name: 1024 * leaf for name, leaf in trees.items()}, owed, jnp.float32(1024))
    np.testing.assert_array_equal(light.sent, heavy.sent)
    np.testing.assert_array_equal(light.shared, heavy.shared)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_by_all(value):
    step, owed = summing(4)
    trees = drawn(2)
    trees["b"][5, 3, 3, 3] = value
    sums, _ = step(trees, owed, jnp.float32(1))
    assert not np.isfinite(np.asarray(sums["b"])[:, 3, 3, 3]).any()
    assert np.isfinite(np.asarray(sums["a"])).all()


@pytest.mark.parametrize(("bits", "share"), [(4, 0.29), (8, 0.54)])
def test_bytes_on_the_wire(bits, share):
    """Of what an all-reduce of the same values in bfloat16 sends, by the collectives of the two programs."""
    mesh, size = make_mesh(data=8), 100_000
    owed = jax.eval_shape(lambda: nothing_owed(size, 8, mesh))
    rows = partial(jax.shard_map, mesh=mesh, in_specs=per_device(mesh), out_specs=per_device(mesh), check_vma=False)
    x = jax.ShapeDtypeStruct((8, size), jnp.float32)

    def coded(x, sent, shared):
        return sum_tree(x[0], Owed(sent, shared), jnp.float32(1), BATCH_AXES, bits)[0][None]

    half = jax.make_jaxpr(rows(lambda x: jax.lax.psum(x.astype(jnp.bfloat16), BATCH_AXES)))(x)
    ours = jax.make_jaxpr(rows(coded))(x, owed.sent, owed.shared)
    assert sent_bytes(half) == 2 * 7 / 8 * 2 * size
    padded = padded_size(size, 8)
    assert sent_bytes(ours) == 2 * 7 / 8 * padded * (bits / 8 + 2 / BLOCK)
    assert sent_bytes(ours) <= share * sent_bytes(half)


def test_traffic_counts_loops_and_refuses_what_it_cannot_know():
    mesh = make_mesh(data=2, fsdp=4)
    over = partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    x = jnp.zeros(16)

    def loop(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "fsdp"), None), x, length=5)[0]

    assert sent_bytes(jax.make_jaxpr(jax.jit(over(loop)))(x)) == 5 * 2 * 3 / 4 * 64
    assert sent_bytes(jax.make_jaxpr(over(lambda x: jax.lax.psum_scatter(x, "data", tiled=True)))(x)) == 32
    unknown = over(lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: jax.lax.pmax(c, "data") + 1, x))
    with pytest.raises(ValueError, match="in a while"):
        sent_bytes(jax.make_jaxpr(unknown)(x))


def test_settings_that_make_no_sense_are_refused():
    assert (bits_of("full", 1), bits_of("4bit", 2)) == (None, 4)
    with pytest.raises(UserError, match="gradient_reduction='2bit' is unknown: it must be one of full, 8bit, 4bit"):
        bits_of("2bit", 8)
    with pytest.raises(UserError, match="one device has nothing to send"):
        bits_of("8bit", 1)
