"""Batches and states put on a mesh; what only several processes can show is in tests/distributed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastjax.errors import UserError
from fastjax.parallel import hosts
from fastjax.parallel.hosts import check_every_process_takes_part, onto_mesh, own_rows, place_batch, to_host
from fastjax.parallel.mesh import make_mesh


def test_a_batch_lies_on_the_mesh_by_rows():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert own_rows(mesh, 8).tolist() == own_rows(None, 8).tolist() == list(range(8))
    for shape in ((8, 3), (2, 8, 3)):
        values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        placed = place_batch({"input_ids": values}, mesh, 8)["input_ids"]
        np.testing.assert_array_equal(placed, values)
        assert placed.sharding.shard_shape(shape) == (*shape[:-2], 2, 3)
    assert place_batch({"input_ids": values}, None, 8)["input_ids"] is values


@pytest.mark.parametrize("devices", [[0, 1, 4, 5], [0, 2, 5, 7]])
def test_a_part_of_the_rows_finds_its_devices(monkeypatch, devices):
    """As if only the devices of one process were there to be given shards; the rows of others it need not hold."""
    mesh = make_mesh(data=8)
    own = np.array([row for device in devices for row in (2 * device, 2 * device + 1)])
    given = {}

    def note(shape, sharding, shard):
        indices = sharding.devices_indices_map(shape)
        given.update({d.id: shard(indices[d]) for d in mesh.devices.flat if d.id in devices})

    monkeypatch.setattr(hosts, "own_rows", lambda mesh, rows: own)
    monkeypatch.setattr(jax, "make_array_from_callback", note)
    whole = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    place_batch({"input_ids": whole[own]}, mesh, 16)
    for device in devices:
        np.testing.assert_array_equal(given[device], whole[2 * device : 2 * device + 2])


def test_everything_goes_to_the_mesh_once():
    mesh = make_mesh(fsdp=4)
    split = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("fsdp")))
    state = onto_mesh({"split": split, "count": jnp.int32(3), "rng": jax.random.key(1)}, mesh)
    assert state["split"] is split
    assert all(state[name].sharding == NamedSharding(mesh, PartitionSpec()) for name in ("count", "rng"))
    assert state["rng"] == jax.random.key(1)
    np.testing.assert_array_equal(to_host(split), np.arange(8.0))


def test_a_mesh_that_leaves_devices_out_is_refused(monkeypatch):
    check_every_process_takes_part(None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    check_every_process_takes_part(make_mesh(data=8))
    with pytest.raises(UserError, match="2 processes have 8 devices and the mesh has 4: give the mesh all of them"):
        check_every_process_takes_part(make_mesh(data=4))
    with pytest.raises(UserError, match=r"and there is no mesh: .* mesh.fsdp=8"):
        check_every_process_takes_part(None)


def test_importing_starts_no_device():
    """A process must be able to join others first."""
    environ = os.environ | {"JAX_PLATFORMS": "none"}  # whoever asks for a device gets an error
    subprocess.run([sys.executable, "-c", "import fastjax.cli"], env=environ, check=True)
