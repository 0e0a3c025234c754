"""Collectives on trees whose leaves each know their PartitionSpec."""

from typing import Any

import jax
from jax.sharding import PartitionSpec


def gather_leaf(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole of an array from its shards, inside shard_map."""
    for dimension, names in enumerate(spec):
        if names is not None:
            leaf = jax.lax.all_gather(leaf, names, axis=dimension, tiled=True)
    return leaf


def gather_tree(tree: Any, specs: Any) -> Any:
    """`gather_leaf` for each leaf; a packed weight travels as its packed bytes."""
    return jax.tree.map(gather_leaf, tree, specs)


def without_leading_axis(spec: PartitionSpec) -> PartitionSpec:
    """The spec of one slice of a stacked array, whose stack axis is never split."""
    return PartitionSpec(*spec[1:])
