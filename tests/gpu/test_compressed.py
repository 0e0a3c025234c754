"""On several GPUs: sums sent as codes are near the true ones, the same on all, and what is owed makes up for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastjax.parallel.compressed import nothing_owed, per_device, sum_tree
from fastjax.parallel.mesh import BATCH_AXES, make_mesh

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("bits", "near"), [(4, 0.2), (8, 0.0125)])
def test_sums_and_debts_are_the_truth(bits: int, near: float) -> None:
    devices, size = jax.device_count(), 1_000_003
    mesh = make_mesh(data=devices)
    rows = per_device(mesh)

    def one(x, owed, weight):
        total, owed = sum_tree(x[0], owed, weight, BATCH_AXES, bits)
        return total[None], owed

    in_specs, out_specs = (rows, rows, PartitionSpec()), (rows, rows)
    step = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    owed, truth, came = nothing_owed(size, devices, mesh), np.zeros(size), np.zeros(size)
    for number in range(3):
        x = np.random.default_rng(number).standard_t(3, (devices, size)).astype(np.float32)
        sums, owed = step(jax.device_put(x, NamedSharding(mesh, rows)), owed, jnp.float32(7))
        sums = np.asarray(sums)
        assert (sums == sums[0]).all()
        truth, came = truth + x.sum(0, dtype=np.float64), came + sums[0]
    assert np.linalg.norm(came - truth) <= near * np.linalg.norm(truth)
    left = 7 * (np.asarray(owed.sent, np.float64).sum(0) + np.asarray(owed.shared, np.float64).reshape(-1))
    np.testing.assert_allclose(came + left[:size], truth, atol=1e-3)
