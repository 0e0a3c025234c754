"""Collectives inside `shard_map`, on trees whose leaves each know their PartitionSpec, and on rows of a model."""

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def split_dimension(spec: PartitionSpec, axis: str) -> int | None:
    """The dimension that a mesh axis splits, by itself or with others."""
    return next((at for at in range(len(spec)) if axis in axes_of_dimension(spec, at)), None)


def axes_of_dimension(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes that split a dimension."""
    names = spec[dimension] if dimension < len(spec) else None
    return (names,) if isinstance(names, str) else names or ()


def parts_of_dimension(spec: PartitionSpec, dimension: int, mesh: Mesh | AbstractMesh) -> int:
    """How many parts a dimension is split into."""
    return math.prod(mesh.shape[name] for name in axes_of_dimension(spec, dimension))


def gather_leaf(leaf: jax.Array, spec: PartitionSpec, axis: str) -> jax.Array:
    """An array from the shards that the devices of one mesh axis have of it; what other axes split stays split.

    Of the axes that split a dimension together the innermost can be gathered alone.
    """
    dimension = split_dimension(spec, axis)
    if dimension is None:
        return leaf
    assert axes_of_dimension(spec, dimension)[-1] == axis, (spec, axis)
    return jax.lax.all_gather(leaf, axis, axis=dimension, tiled=True)


def gather_tree(tree: Any, specs: Any, axis: str) -> Any:
    """`gather_leaf` for each leaf; a packed weight travels as its packed bytes."""
    return jax.tree.map(partial(gather_leaf, axis=axis), tree, specs)


def scatter_leaf(leaf: jax.Array, spec: PartitionSpec, axis: str) -> jax.Array:
    """The shard of a device of the sum over the mesh axis that splits the array; as it is where the axis splits nothing."""
    dimension = split_dimension(spec, axis)
    if dimension is None:
        return leaf
    return jax.lax.psum_scatter(leaf, axis, scatter_dimension=dimension, tiled=True)


def scatter_tree(tree: Any, specs: Any, axis: str) -> Any:
    """`scatter_leaf` for each leaf: what becomes of gradients of what `gather_tree` gathered."""
    return jax.tree.map(partial(scatter_leaf, axis=axis), tree, specs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_parts(x: jax.Array, axis: str) -> jax.Array:
    """The sum of what each device of a mesh axis has, of which all go on to make the same of it.

    Each then knows the whole gradient of the sum, and that is the gradient of its own part. JAX cannot know that the
    devices agree: its derivative of a psum is another psum.
    """
    return jax.lax.psum(x, axis)


sum_parts.defvjp(lambda x, axis: (jax.lax.psum(x, axis), None), lambda axis, _, g: (g,))


def without_leading_axis(spec: PartitionSpec) -> PartitionSpec:
    """The spec of one slice of a stacked array, whose stack axis is never split."""
    return PartitionSpec(*spec[1:])
