"""The device mesh: four named axes, of which those left out have size 1."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from fastjax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")  # over which the rows of a batch are split
TOKEN_AXES = (*BATCH_AXES, "context")  # over which its tokens are


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over the first data * fsdp * tensor * context devices."""
    sizes = (data, fsdp, tensor, context)
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(sizes))
    if min(sizes) < 1 or needed > len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"a mesh of {wanted} needs {needed} devices; there are {len(devices)}.")
    return Mesh(np.array(devices[:needed]).reshape(sizes), AXES)


def planned_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there; an axis left out has size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """The size of an axis; 1 where the mesh does not have it."""
    if axis not in AXES:
        raise UserError(f"mesh axis {axis!r} is unknown; axes are {', '.join(AXES)}.")
    return dict(mesh.shape).get(axis, 1)


def summing_devices(mesh: Mesh | None) -> int:
    """How many devices sum their gradients: those that have tokens of their own."""
    return 1 if mesh is None else math.prod(axis_size(mesh, axis) for axis in TOKEN_AXES)


def standard_mesh(mesh: Mesh) -> Mesh:
    """The same devices with all four axes in our order, their shardings inside jit left to XLA.

    What a caller's mesh leaves out, or how it was made (`jax.make_mesh` makes explicit axes), is settled here once.
    """
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:  # a misspelt axis would silently shard nothing
        raise UserError(f"mesh axes {', '.join(map(str, unknown))} are unknown; axes are {', '.join(AXES)}.")
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    sizes = [axis_size(mesh, axis) for axis in AXES]
    return Mesh(mesh.devices.transpose(order).reshape(sizes), AXES)
