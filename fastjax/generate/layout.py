"""How a model and the rows of a batch lie on the devices that generate: on one, or on a mesh, where the model says so.

Rows are divided over `data` and `fsdp`, as in training. Each device of `tensor` has some heads with their keys and values,
some columns of the MLP and some words, as fastjax.parallel.rules has it; logits are put together before a token is chosen,
so all choose the same. Layers that `fsdp` divides are put together one at a time, anew for each token: that saves memory and
costs time. What lies outside the layers is whole over `fsdp`, and so is LoRA. `context` divides nothing here.

Programs are written for what one device has; `Layout.divided` runs them on all. Only what must meet is sent: under `data`
alone nothing is, and each device goes on at its own pace; under `fsdp` all must take part in each token's gathering.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastjax.errors import UserError
from fastjax.generate.forward import Share
from fastjax.models.config import LlamaConfig
from fastjax.models.llama import Llama, param_specs
from fastjax.parallel.collectives import gather_tree, split_dimension
from fastjax.parallel.hosts import mesh_of, spread
from fastjax.parallel.mesh import AXES, BATCH_AXES, standard_mesh
from fastjax.parallel.rules import partition_spec
from pallas_kernels.nf4 import NF4Array

TENSOR, FSDP = "tensor", "fsdp"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model without its arrays, and where they lie; as a program's static argument it says what to compile."""

    definition: nnx.GraphDef
    mesh: Mesh | None = None
    specs: tuple[PartitionSpec, ...] = ()  # of the parameters' leaves, in order
    in_step: tuple[str, ...] = ()  # the mesh axes of rows whose devices all take part in every token

    @classmethod
    def of(cls, model: Llama) -> "tuple[Layout, nnx.State]":
        """The layout, and the parameters where it wants them."""
        definition, parameters = nnx.split(model)
        mesh = mesh_of(parameters)
        if mesh is None or mesh.size == 1:
            return cls(definition), parameters
        mesh = standard_mesh(mesh)
        specs = parameter_specs(parameters, model.config, mesh)
        parameters = jax.tree.map(lambda leaf, spec: placed(leaf, NamedSharding(mesh, spec)), parameters, specs)
        divided = BATCH_AXES if model.config.rope.kind == "dynamic" else (FSDP,)  # whose frequencies follow all rows
        return cls(definition, mesh, tuple(jax.tree.leaves(specs)), several(mesh, divided)), parameters

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The mesh axes that divide a batch's rows."""
        return () if self.mesh is None else several(self.mesh, BATCH_AXES)

    @property
    def row_shares(self) -> int:
        """How many devices have rows of their own."""
        return math.prod(self.mesh.shape[axis] for axis in self.row_axes) if self.mesh is not None else 1

    @property
    def rows(self) -> PartitionSpec:
        """Of an array whose first axis is the rows."""
        return PartitionSpec(self.row_axes or None)

    @property
    def tensor(self) -> str | None:
        return TENSOR if self.mesh is not None and self.mesh.shape[TENSOR] > 1 else None

    def model(self, parameters: nnx.State) -> tuple[Llama, Share]:
        """What a device has of the model, inside a program."""
        gather = None
        if self.mesh is not None and self.mesh.shape[FSDP] > 1:
            specs = nnx.state(nnx.merge(self.definition, self.specs_of(parameters)).layers)
            gather = lambda layers: gather_tree(layers, specs, FSDP)  # noqa: E731
        return nnx.merge(self.definition, parameters), Share(self.tensor, gather, self.row_axes)

    def specs_of(self, parameters: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(parameters), self.specs)

    def of_rows(self, tree: Any) -> Any:
        """The specs of arrays whose first axis is the rows, or of a cache, whose second is."""

        def spec(leaf: Any) -> PartitionSpec:
            if leaf.ndim < 4:
                return self.rows
            return PartitionSpec(None, self.row_axes or None, self.tensor)

        return jax.tree.map(spec, tree)

    def divided(self, program: Callable, parameters: Any, *rows: Any, out: Callable[[], Any]) -> Any:
        """program(parameters, *rows) on each device with what it has; `out`: the specs of the results."""
        if self.mesh is None:
            return program(parameters, *rows)
        specs = None if parameters is None else self.specs_of(parameters)
        in_specs = (specs, *map(self.of_rows, rows))
        on_devices = jax.shard_map(program, mesh=self.mesh, in_specs=in_specs, out_specs=out(), check_vma=False)
        return on_devices(parameters, *rows)

    def everywhere(self, x: jax.Array) -> jax.Array:
        """All rows, of those that each device has; inside a program."""
        return jax.lax.all_gather(x, self.row_axes, tiled=True) if self.row_axes else x

    def anywhere(self, condition: jax.Array) -> jax.Array:
        """Whether it holds on any device that must go on with the others; inside a program."""
        if not self.in_step:
            return condition
        return jax.lax.pmax(condition.astype(jnp.int32), self.in_step) > 0

    def zeros(self, make: Callable[[], Any]) -> Any:
        """Zeros for arrays of rows like those that `make` makes."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make))
        mesh, shapes = self.mesh, jax.eval_shape(make)
        return jax.tree.map(
            lambda leaf, spec: jnp.zeros(leaf.shape, leaf.dtype, device=NamedSharding(mesh, spec)),
            shapes,
            self.of_rows(shapes),
        )


def several(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def parameter_specs(parameters: nnx.State, config: LlamaConfig, mesh: Mesh) -> Any:
    """Where each leaf is to lie."""
    declared = param_specs(config)

    def weight_spec(name: str) -> PartitionSpec:
        # a head of its own beside the embedding it was tied to
        spec = declared["embed_tokens.weight" if name == "lm_head.weight" and name not in declared else name]
        over = partition_spec(spec.axes, mesh)
        return PartitionSpec(None, *over) if spec.layers is not None else without(over, FSDP)

    def spec(path: Any, leaf: Any) -> Any:
        *module, name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if module[-1] == "lora":
            over = without(weight_spec(".".join([*module[:-1], "weight"])), FSDP)
            _, out, into = (*over, None, None)[:3]
            factors = {"a": PartitionSpec(None, into, None), "b": PartitionSpec(None, None, out)}
            return factors.get(name, PartitionSpec())
        over = weight_spec(".".join([*module, name]))
        if not isinstance(leaf, NF4Array):
            return over
        found = leaf.codes.sharding
        # packed for one device, a share might hold parts of what shares a scale
        if not isinstance(found, NamedSharding) or any(
            split_dimension(found.spec, axis) != split_dimension(over, axis) for axis in AXES
        ):
            raise UserError(
                f"{'.'.join([*module, name])} does not lie on the mesh as its rules say; load the model with"
                " from_pretrained(..., mesh=mesh)."
            )
        return jax.tree.map(lambda part: part.sharding.spec, leaf)

    return jax.tree_util.tree_map_with_path(spec, parameters, is_leaf=lambda leaf: isinstance(leaf, NF4Array))


def without(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """The same, not divided over `axis`."""

    def rest(names: Any) -> Any:
        left = tuple(name for name in ((names,) if isinstance(names, str) else names or ()) if name != axis)
        return left or None

    return PartitionSpec(*map(rest, spec))


def placed(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A parameter where it is to lie; itself where it does."""
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return spread(leaf, sharding) if leaf.is_fully_addressable else jax.device_put(leaf, sharding)
