"""Where a parameter goes: its sharding on the mesh, and the compiled program that puts a tensor there.

A weight W [out, in] lies on the mesh as `fastjax.parallel.rules` says, PartitionSpec(rows, columns). The leaves of a
packed one follow it: codes and scales are split the same way, in whole blocks of columns. Of `nested_scales` each value
covers a cell of scales (see NF4Array). What a device holds must be dequantisable by itself, so no cell may reach over
the edge of its share: where one would, cells are made smaller and their values repeated; along an axis with a single
cell every device holds that. Stacks add a leading layer axis, which is never split.

A stack is allocated once, as zeros. Each layer is written into it by a program that donates the stack: XLA updates it
in place, and neither host nor device holds a second copy.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fastjax.models import ParamSpec
from fastjax.parallel.hosts import spread
from fastjax.parallel.mesh import standard_mesh
from fastjax.parallel.rules import partition_spec
from fastjax.weights.errors import UnevenShardingError
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4
from pallas_kernels.nf4 import nf4_partition_specs

Weight = jax.Array | NF4Array


@dataclasses.dataclass(frozen=True)
class Target:
    """How a parameter is kept. Parameters kept alike have equal targets, and so share compiled programs."""

    shape: tuple[int, ...]
    layers: int | None
    dtype: np.dtype
    quantize: bool
    mesh: Mesh | AbstractMesh | None
    partition: PartitionSpec  # of one tensor, without the layer axis

    @property
    def sharding(self) -> NamedSharding | None:
        """That of one tensor before packing; None is JAX's default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.partition)

    def axes(self, dimension: int) -> tuple[str, ...]:
        """The mesh axes that split a dimension."""
        names = self.partition[dimension] if dimension < len(self.partition) else None
        return (names,) if isinstance(names, str) else tuple(names or ())

    def parts(self, dimension: int) -> int:
        """How many parts a dimension is split into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.axes(dimension))


def make_target(spec: ParamSpec, *, quantize: bool, dtype: Any, mesh: Mesh | AbstractMesh | None) -> Target:
    """The target of a declared parameter, once it is sure that the mesh splits it into equal parts."""
    if isinstance(mesh, Mesh):
        mesh = standard_mesh(mesh)
    partition = PartitionSpec() if mesh is None else partition_spec(spec.axes, mesh)
    target = Target(spec.shape, spec.layers, np.dtype(dtype), quantize, mesh, partition)
    split = any(target.parts(dimension) > 1 for dimension in range(len(spec.shape)))
    for dimension, (size, axis) in enumerate(zip(spec.shape, spec.axes, strict=True)):
        block = NF4Array.block_size if quantize and split and dimension == len(spec.shape) - 1 else 1
        parts = target.parts(dimension)
        if size % (parts * block):
            unit = f" of {block}-value blocks" if block > 1 else ""
            over = " x ".join(f"{name} {mesh.shape[name]}" for name in target.axes(dimension)) if mesh else ""
            raise UnevenShardingError(
                f"weight {spec.hf_name} cannot be split evenly: its axis {axis!r} of size {size} does not divide into "
                f"{parts} equal parts{unit} ({over or 'its other axis is split'}); choose a mesh with smaller axes."
            )
    return target


def pack(target: Target, value: Weight) -> Weight:
    """One tensor as it is kept: cast, and quantised where the target says so.

    The cast comes first because that is what transformers' from_pretrained(dtype=..., load_in_4bit=True) does: what is
    quantised is the weight that an unquantised model of that dtype would have.
    """
    if isinstance(value, NF4Array):
        return refine_cells(target, value) if target.quantize else dequantize_nf4(value, target.dtype)
    value = value.astype(target.dtype)
    return refine_cells(target, quantize_nf4(value)) if target.quantize else value


def refine_cells(target: Target, packed: NF4Array) -> NF4Array:
    """The same weight with cells of nested_scales that each lie within one device's share."""
    if packed.nested_scales is None or packed.nested_cell is None:
        return packed
    nested, cell = packed.nested_scales, list(packed.nested_cell)
    for dimension, (size, parts) in enumerate(zip(packed.scales.shape, map(target.parts, (0, 1)), strict=True)):
        if parts > 1 and nested.shape[dimension] > 1:
            finer = math.gcd(cell[dimension], size // parts)
            nested = jnp.repeat(nested, cell[dimension] // finer, axis=dimension)
            nested = jax.lax.slice_in_dim(nested, 0, -(-size // finer), axis=dimension)
            cell[dimension] = finer
    return dataclasses.replace(packed, nested_scales=nested, nested_cell=(cell[0], cell[1]))


def place_packed(target: Target, packed: NF4Array) -> NF4Array:
    """A packed tensor on its way to the devices: each leaf's share, where it is to stay packed."""
    if target.mesh is None or not target.quantize:
        return packed
    packed = refine_cells(target, packed)
    return jax.tree.map(spread, packed, shardings_of(target, packed))


def kept_shapes(target: Target, value: Any) -> Any:
    """The leaves of a parameter made of tensors like `value`, all its layers, by shape and dtype."""
    one = jax.eval_shape(partial(pack, target), value)
    layers = () if target.layers is None else (target.layers,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*layers, *leaf.shape), leaf.dtype), one)


def allocate(target: Target, value: Weight) -> Weight:
    """A stack of zeros for tensors like `value`."""
    stack = kept_shapes(target, value)
    shardings = shardings_of(target, stack)
    if shardings is None:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stack)
    return jax.tree.map(lambda leaf, sharding: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), stack, shardings)


def fits(target: Target, stack: Weight, value: Weight) -> bool:
    """Whether the value, as kept, has the stack's structure: two packed ones may differ in kind."""
    return jax.tree.structure(jax.eval_shape(partial(pack, target), value)) == jax.tree.structure(stack)


def shardings_of(target: Target, kept: Any) -> Any:
    """The sharding of each leaf of a kept parameter, stacked or not; None without a mesh."""
    if target.mesh is None:
        return None
    leading = kept.ndim - len(target.shape)
    spec = PartitionSpec(*[None] * leading, *target.partition)
    specs = nf4_partition_specs(kept, spec) if isinstance(kept, NF4Array) else spec
    return jax.tree.map(
        partial(NamedSharding, target.mesh), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def store(
    target: Target, stack: Weight | None, value: Weight, layer: int | None
) -> tuple[Weight, tuple[jax.Array, jax.Array]]:
    """The parameter with `value` in it, at `layer` of the stack if there is one.

    Also whether the value is finite, and whether it still is in the target's dtype.
    """
    if stack is None and isinstance(value, jax.Array) and not target.quantize and value.dtype == target.dtype:
        finite = _all_finite(value)  # it is the parameter already
        return value, (finite, finite)
    return _store(stack, value, np.int32(layer or 0), target=target)


@partial(jax.jit, static_argnames="target", donate_argnames="stack")
def _store(
    stack: Weight | None, value: Weight, layer: jax.Array, *, target: Target
) -> tuple[Weight, tuple[jax.Array, jax.Array]]:
    kept = pack(target, value)
    if stack is not None:
        kept = jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), stack, kept)
    if (shardings := shardings_of(target, kept)) is not None:
        kept = jax.lax.with_sharding_constraint(kept, shardings)
    cast = value if isinstance(value, NF4Array) else value.astype(target.dtype)
    return kept, (_all_finite(value), _all_finite(cast))


@jax.jit
def _all_finite(value: Weight) -> jax.Array:
    """Whether no float in an array, or in any leaf of a packed one, is NaN or Inf."""
    floats = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
