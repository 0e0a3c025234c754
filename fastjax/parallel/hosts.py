"""Arrays whose shards lie on several processes: made of what each process has, and brought back whole.

A batch is split over the mesh by rows, so each process lays out the rows of its own devices and no others; their order is
that of the mesh, and the batch is the same however many processes share it. With one process all of this is the identity.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from fastjax.errors import UserError
from fastjax.parallel.mesh import BATCH_AXES


def check_every_process_takes_part(mesh: Mesh | None) -> None:
    """A process without a device on the mesh would have nothing to do, and the others would wait for it for ever."""
    if jax.process_count() == 1:
        return
    devices = jax.device_count()
    if mesh is None or mesh.size != devices:
        found = "there is no mesh" if mesh is None else f"the mesh has {mesh.size}"
        raise UserError(
            f"{jax.process_count()} processes have {devices} devices and {found}: give the mesh all of them, such as"
            f" mesh.data={devices} or mesh.fsdp={devices}."
        )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Of int32 [B, S], or [A, B, S]: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), BATCH_AXES, None))


def own_rows(mesh: Mesh | None, rows: int) -> Int[np.ndarray, "own"]:
    """Which of a batch's rows lie on this process's devices, in order."""
    if mesh is None:
        return np.arange(rows)
    parts = batch_sharding(mesh, 2).addressable_devices_indices_map((rows, 1)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[0]] for index in parts if index is not None]))


def place_batch(batch: Mapping[str, Any], mesh: Mesh | None, rows: int) -> dict[str, Any]:
    """A batch of `rows` rows on the mesh, from those of this process: [own, S], or [A, own, S]."""
    if mesh is None:
        return dict(batch)
    own = own_rows(mesh, rows)

    def place(array: np.ndarray) -> jax.Array:
        *leading, _, length = array.shape
        shape = (*leading, rows, length)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[-2].indices(rows)
            first = np.searchsorted(own, start)
            return array[..., first : first + stop - start, :]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, len(shape)), shard)

    return {name: place(array) for name, array in batch.items()}


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that some leaf of a tree of arrays lies on; None where all lie on single devices."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((each.mesh for each in shardings if isinstance(each, NamedSharding)), None)  # pyright: ignore[reportReturnType]


def onto_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """The same arrays, those that lie elsewhere put on the mesh whole; every process must hold the same values."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if getattr(leaf.sharding, "mesh", None) == mesh else spread(leaf, whole), tree
    )


def spread(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, as one on the mesh: each device is sent its share.

    `jax.device_put` does the same among processes, but has them send each other all values first, to compare them.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(spread(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The values of an array. Of one that is split over processes they are gathered, which takes all of these."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    assert isinstance(array.sharding, NamedSharding)
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda values: values, out_shardings=whole)(array))
