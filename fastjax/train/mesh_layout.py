"""How a model and the state of its training lie on a mesh, and what a step's devices gather, scatter and sum.

Frozen weights lie as they were loaded (fastjax.parallel.rules). Trained parameters, and with them the optimizer's states,
are split as a step works with them over `tensor`, and every matrix over `fsdp` besides: no device has more of them than
its part. Inside the step what fsdp splits of a layer is gathered when the layer runs, in either pass, packed weights as
their packed bytes; the gradients of the layer are scattered as soon as they are there, summed over fsdp on the way, so
that whole ones are there of one layer at a time. Over the other axes they are summed once a step, after the last
micro-batch. The optimizer then works on whole arrays whose parts lie apart, each device on its own (XLA sees to what
crosses them: norms, sums over rows, Muon's products).

Along which dimension fsdp splits a matrix: the first whose parts are whole blocks of 8-bit moments (blockwise_8bit.py), so
that each device has the scales of its codes, else the first that divides; the layer axis never, as each layer is gathered
by itself. What divides nowhere stays whole, and so do vectors, norms and biases, too small to gain by it.

Gradients that are sent as codes (parallel/compressed.py) are one vector of all parameters, whole on every device that
sends; there the step is given whole parameters, and only states and parameters at rest are split.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fastjax.errors import UserError
from fastjax.models.config import LlamaConfig
from fastjax.models.llama import Llama
from fastjax.parallel import compressed
from fastjax.parallel.collectives import (
    axes_of_dimension,
    gather_leaf,
    gather_tree,
    parts_of_dimension,
    scatter_tree,
    split_dimension,
    without_leading_axis,
)
from fastjax.parallel.mesh import BATCH_AXES, TOKEN_AXES, axis_size, planned_mesh, standard_mesh
from fastjax.parallel.rules import partition_spec
from fastjax.parallel.sequence import SequenceSplit
from fastjax.train.blockwise_8bit import BLOCK_SIZE
from fastjax.train.loss import Batch
from fastjax.train.param_rules import HEAD, KeyPath, names
from fastjax.train.tensor_parallel import AXIS as TENSOR
from fastjax.train.tensor_parallel import (
    check_frozen,
    check_tensor_size,
    declared,
    is_summand,
    tensor_specs,
    whole_gradients,
)
from pallas_kernels import NF4Array
from pallas_kernels.nf4 import nf4_partition_specs
from pallas_kernels.ordering import after

FSDP = "fsdp"
AnyMesh = Mesh | AbstractMesh


def trained_specs(params: Any, config: LlamaConfig, mesh: AnyMesh) -> Any:
    """How each trained parameter lies at rest, as the module says: a PartitionSpec each."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, spec: _split_over_fsdp(spec, leaf.shape, int(names(path)[0] == "layers"), mesh),
        params,
        tensor_specs(params, config, mesh),
    )


def _split_over_fsdp(spec: PartitionSpec, shape: tuple[int, ...], first: int, mesh: AnyMesh) -> PartitionSpec:
    """`spec` with fsdp in it, innermost; the dimensions from `first` on are those within a layer."""
    size, entries = axis_size(mesh, FSDP), [*spec, *[None] * (len(shape) - len(spec))]
    if size == 1 or len(shape) - first < 2:
        return spec
    parts = {at: size * parts_of_dimension(spec, at, mesh) for at in range(first, len(shape))}
    fitting = [at for at, count in parts.items() if shape[at] % count == 0]
    in_blocks = [at for at in fitting if math.prod(shape[at:]) // parts[at] % BLOCK_SIZE == 0]
    if not fitting:
        return spec
    at = (in_blocks or fitting)[0]
    entries[at] = (*axes_of_dimension(spec, at), FSDP)
    return PartitionSpec(*entries)


def optimizer_specs(opt_state: Any, params: Any, specs: Any, mesh: AnyMesh) -> Any:
    """How the leaves of an optimizer's state lie: as the parameter whose path theirs contains, as far as its parts divide
    them; those of no parameter (counts, Adafactor's rows and columns) whole.
    """
    by_name: dict[tuple[str, ...], PartitionSpec] = {}
    jax.tree_util.tree_map_with_path(lambda path, _, spec: by_name.update({names(path): spec}), params, specs)

    def spec(path: KeyPath, leaf: Any) -> PartitionSpec:
        parts = names(path)
        runs = [parts[i:j] for i in range(len(parts)) for j in range(len(parts), i, -1)]
        like = next((by_name[run] for run in runs if run in by_name), PartitionSpec())
        fits = [size % parts_of_dimension(like, at, mesh) == 0 for at, size in enumerate(leaf.shape)]
        return PartitionSpec(*[axes if fit else None for axes, fit in zip(like, fits, strict=False)])

    return jax.tree_util.tree_map_with_path(spec, opt_state)


def trained_shardings(params: Any, opt_state: Any, config: LlamaConfig, mesh: AnyMesh) -> tuple[Any, Any]:
    """Of trained parameters and the optimizer's state, at rest."""
    specs = trained_specs(params, config, mesh)
    both = (specs, optimizer_specs(opt_state, params, specs, mesh))
    return jax.tree.map(partial(NamedSharding, mesh), both, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def frozen_specs(frozen: Any, config: LlamaConfig, mesh: AnyMesh) -> Any:
    """How frozen weights would lie once loaded."""

    def spec(path: KeyPath, value: Any) -> Any:
        parts = names(path)
        if parts[-2:] == ("lora", "scale"):
            return PartitionSpec()
        of = declared(".".join(parts), config)
        over = PartitionSpec(*[None] * (of.layers is not None), *partition_spec(of.axes, mesh))
        if isinstance(value, NF4Array) and value.layout == "flat":  # which loading refuses to split, with its reason
            return jax.tree.map(lambda _: PartitionSpec(), value)
        return nf4_partition_specs(value, over) if isinstance(value, NF4Array) else over

    return jax.tree_util.tree_map_with_path(spec, frozen, is_leaf=lambda value: isinstance(value, NF4Array))


def parts(tree: Any, specs: Any, mesh: AnyMesh) -> Any:
    """The shapes of what a device has of each leaf."""

    def part(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = (-(-size // parts_of_dimension(spec, at, mesh)) for at, size in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree.map(part, tree, specs)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGather:
    """The collectives of one decoder layer (models/decoder.py's Gather)."""

    specs: nnx.State  # of all its parameters
    trained: nnx.State  # of the trained ones

    def __call__(self, layer: nnx.State) -> nnx.State:
        return gather_tree(layer, self.specs, FSDP)

    def scatter(self, gradients: nnx.State) -> nnx.State:
        return scatter_tree(gradients, self.trained, FSDP)


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Of one model on one mesh."""

    mesh: AnyMesh
    frozen: nnx.State  # a PartitionSpec per leaf
    trained: nnx.State  # the same, at rest
    given: nnx.State  # the same, as a step's devices are given them
    layer: LayerGather

    @classmethod
    def of(cls, module: Llama, mesh: Mesh, *, in_codes: bool = False) -> "MeshLayout":
        """`in_codes`: gradients are sent as codes."""
        mesh = standard_mesh(mesh)
        check_tensor_size(module.config, axis_size(mesh, TENSOR))

        def spec(leaf: jax.Array) -> PartitionSpec:
            if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.mesh != mesh:
                raise UserError("the model does not lie on this mesh; load it with from_pretrained(..., mesh=mesh).")
            return leaf.sharding.spec

        frozen = nnx.state(module, nnx.Not(nnx.Param))
        specs = jax.tree.map(spec, frozen)
        check_frozen(frozen, module.config, mesh)
        return cls._of(module, mesh, specs, in_codes)

    @classmethod
    def planned(cls, module: Llama, sizes: Mapping[str, int], *, in_codes: bool = False) -> "MeshLayout":
        """Of a model that is not there, on a mesh of such sizes: shapes are enough."""
        mesh = planned_mesh(sizes)
        specs = frozen_specs(nnx.state(module, nnx.Not(nnx.Param)), module.config, mesh)
        return cls._of(module, mesh, specs, in_codes)

    @classmethod
    def _of(cls, module: Llama, mesh: AnyMesh, frozen: Any, in_codes: bool) -> "MeshLayout":
        definition, params, _ = nnx.split(module, nnx.Param, ...)
        trained = trained_specs(params, module.config, mesh)
        given = tensor_specs(params, module.config, mesh) if in_codes else trained
        layers = nnx.merge(definition, given, frozen).layers
        kinds = (nnx.state(layers), nnx.state(layers, nnx.Param))
        layer = LayerGather(*(jax.tree.map(without_leading_axis, specs) for specs in kinds))
        return cls(mesh, frozen, trained, given, layer)

    @property
    def batch_shards(self) -> int:
        return axis_size(self.mesh, "data") * axis_size(self.mesh, FSDP)

    @property
    def tensor(self) -> int:
        return axis_size(self.mesh, TENSOR)

    @property
    def context(self) -> int:
        return axis_size(self.mesh, "context")

    @property
    def split(self) -> SequenceSplit | None:
        return SequenceSplit("context") if self.context > 1 else None

    @cached_property
    def gather_layer(self) -> LayerGather | None:
        """None where every device has whole layers: kernels then find theirs in the stack, as on a single device."""
        specs = jax.tree.leaves(self.layer.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        return self.layer if any(split_dimension(spec, FSDP) is not None for spec in specs) else None

    @property
    def in_codes(self) -> bool:
        return self.given is not self.trained

    def shard(self, gradients: Callable, batch: Batch) -> Callable:
        """`gradients` of whole arrays, each device doing its part."""
        rows = {name: PartitionSpec(*[None] * (value.ndim - 2), BATCH_AXES) for name, value in batch.items()}
        whole, owed = PartitionSpec(), compressed.per_device(self.mesh)
        in_specs = (self.frozen, self.given, rows, whole, whole, owed)
        out_specs = (whole if self.in_codes else self.given, whole, whole, owed)
        return jax.shard_map(gradients, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def gather(
        self, params: nnx.State, frozen: nnx.State, tokens: jax.Array, *, whole: bool
    ) -> tuple[nnx.State, nnx.State]:
        """Both with what lies outside the layers gathered, but for the head; `whole`: everything. Gradients of what is
        gathered come back scattered. In a loop over micro-batches, each gathers anew for its `tokens`.
        """

        def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            return leaf if split_dimension(spec, FSDP) is None else gather_leaf(after(leaf, tokens), spec, FSDP)

        def all_of(state: nnx.State, specs: nnx.State) -> nnx.State:
            later = () if whole else ("layers", HEAD)
            each = {
                name: value if name in later else jax.tree.map(one, value, specs[name]) for name, value in state.items()
            }
            return nnx.State(each)

        return all_of(params, self.given), all_of(frozen, self.frozen)

    @property
    def gather_head(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """Of a head that is not the embedding as well: gathered when the last hidden states are there."""
        specs: list[PartitionSpec] = jax.tree.leaves([dict(each).get(HEAD) for each in (self.given, self.frozen)])
        spec = next(iter(specs), None)
        if spec is None or split_dimension(spec, FSDP) is None:
            return None
        return lambda head, hidden: gather_leaf(after(head, jax.lax.stop_gradient(hidden)), spec, FSDP)

    def summed(
        self, total: Any, owed: compressed.Owed | None, weight: jax.Array, bits: int | None
    ) -> tuple[Any, compressed.Owed | None]:
        """(gradients, (loss, tokens)) of each device summed over those that have tokens of their own, and what is then owed;
        `weight` is that of compressed.sum_gradients."""
        if bits is None or owed is None:
            return self._summed_in_full(total), owed
        gradients = whole_gradients(total[0], self.given) if self.tensor > 1 else total[0]
        return compressed.sum_gradients((gradients, total[1]), owed, weight, TOKEN_AXES, bits)

    def _summed_in_full(self, total: Any) -> Any:
        """One all-reduce for all leaves that are alike in what they were split over: of a model without fsdp, one in all.

        Where layers keep all, their gradients are stacks, complete when the first layer is through, and next to nothing of
        the backward pass is left to hide it under; XLA starts it as soon as its operands are there.
        """
        gradients, sums = total
        leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
        specs = tree.flatten_up_to(self.given)
        axes = [self._to_sum_over(path, spec) for (path, _), spec in zip(leaves, specs, strict=True)]
        of_tokens, totals = self._present(TOKEN_AXES), {}
        for group in dict.fromkeys([of_tokens, *axes]):
            alike = [leaf for (_, leaf), own in zip(leaves, axes, strict=True) if own == group]
            both = (alike, sums if group == of_tokens else ())
            alike, others = jax.lax.psum(both, group) if group else both
            totals[group], sums = iter(alike), others or sums
        return tree.unflatten(next(totals[own]) for own in axes), sums

    def _to_sum_over(self, path: KeyPath, spec: PartitionSpec) -> tuple[str, ...]:
        axes = [axis for axis in TOKEN_AXES if axis != FSDP or split_dimension(spec, FSDP) is None]
        return self._present([*axes, TENSOR] if is_summand(path, spec) else axes)

    def _present(self, axes: Sequence[str]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if axis_size(self.mesh, axis) > 1)
