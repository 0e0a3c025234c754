"""What the devices of the mesh axis `tensor` have of a model, and whole gradients from what each finds.

Frozen weights lie on the mesh as fastjax.parallel.rules says, trained parameters along with them. decoder_layer.py and
projection.py do the arithmetic; of a parameter's gradient it leaves a device with one of three things:

    a part       where the parameter is split: they stay apart, or are put together for a sum of whole gradients
    a summand    of LoRA's other factor, whose every value meets rows or columns of all devices: they are added up
    all of it    where the parameter meets whole rows alone, as norms do and the biases of o_proj and down_proj
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from fastjax.errors import UserError
from fastjax.models.config import LlamaConfig
from fastjax.models.llama import param_specs
from fastjax.models.spec import ParamSpec
from fastjax.parallel.collectives import gather_leaf, split_dimension
from fastjax.parallel.mesh import axis_size
from fastjax.parallel.rules import partition_spec
from pallas_kernels import NF4Array

AXIS = "tensor"


def check_tensor_size(config: LlamaConfig, size: int, *, packed: bool = False) -> None:
    """Refuse a `tensor` of so many devices where that would cut through a head or a block, or leave unequal shares."""
    block = NF4Array.block_size if packed else 1
    in_blocks = f" in blocks of {block}" if packed else ""
    divided = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        f"the width of all heads{in_blocks}": _blocks(config.num_heads * config.head_dim, block),
        f"intermediate_size{in_blocks}": _blocks(config.intermediate_size, block),
        "vocab_size": config.vocab_size,
    }
    largest = math.gcd(*divided.values())
    bad = next((name for name, count in divided.items() if count % size), None)
    if bad is not None:
        fitting = ", ".join(str(n) for n in range(1, largest + 1) if largest % n == 0)
        raise UserError(
            f"mesh axis tensor={size} does not divide the model's {bad} = {divided[bad]}; sizes that fit it are {fitting}."
        )


def _blocks(width: int, block: int) -> int:
    """In how many parts a width can be cut at most."""
    return width // block if width % block == 0 else 1


def tensor_specs(params: Any, config: LlamaConfig, mesh: Mesh | AbstractMesh) -> Any:
    """How each trained parameter is split over `tensor`, and over nothing else; the whole of it without that axis."""

    def spec(path: Any, _: jax.Array) -> PartitionSpec:
        *module, name = _names(path)
        if module[-1] != "lora":
            return _tensor_spec(".".join([*module, name]), config, mesh)
        weight = _tensor_spec(".".join([*module[:-1], "weight"]), config, mesh)
        layer, out, into = (*weight, None, None, None)[:3]
        return PartitionSpec(layer, into, None) if name == "a" else PartitionSpec(layer, None, out)

    if axis_size(mesh, AXIS) == 1:
        return jax.tree.map(lambda _: PartitionSpec(), params)
    return jax.tree_util.tree_map_with_path(spec, params)


def check_frozen(frozen: nnx.State, config: LlamaConfig, mesh: Mesh) -> None:
    """Refuse a model whose frozen weights are not split over `tensor` as the rules say: the step would add them up."""
    if axis_size(mesh, AXIS) == 1:
        return

    def check(path: Any, leaf: jax.Array) -> None:
        name, packed_leaf = ".".join(_names(path)), str(getattr(path[-1], "name", ""))
        if name.endswith("lora.scale") or packed_leaf in ("nested_scales", "offset"):
            return
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
        found = split_dimension(leaf.sharding.spec, AXIS)
        if found != split_dimension(_tensor_spec(name, config, mesh), AXIS):
            raise UserError(
                f"{name} is not split over mesh axis tensor as a step needs it; load the model with"
                " from_pretrained(..., mesh=mesh)."
            )

    jax.tree_util.tree_map_with_path(check, frozen)


def is_summand(path: Any, spec: PartitionSpec) -> bool:
    """Whether what a device finds of a parameter's gradient is one of several summands of it."""
    return split_dimension(spec, AXIS) is None and "lora" in _names(path)


def whole_gradients(gradients: nnx.State, specs: Any) -> nnx.State:
    """Of each trained parameter, from what the devices have; inside shard_map."""

    def whole(path: Any, gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        if split_dimension(spec, AXIS) is not None:
            return gather_leaf(gradient, spec, AXIS)
        return jax.lax.psum(gradient, AXIS) if is_summand(path, spec) else gradient

    return jax.tree_util.tree_map_with_path(whole, gradients, specs)


def declared(name: str, config: LlamaConfig) -> ParamSpec:
    """What a parameter is declared as."""
    specs = param_specs(config)
    # a head that is trained apart from the embedding it was tied to
    return specs["embed_tokens.weight" if name == "lm_head.weight" and name not in specs else name]


def _tensor_spec(name: str, config: LlamaConfig, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Of a declared parameter, what `tensor` splits."""
    spec = declared(name, config)
    over = partition_spec(spec.axes, mesh)
    alone = [AXIS if split_dimension(PartitionSpec(names), AXIS) == 0 else None for names in over]
    return PartitionSpec(*[None] * (spec.layers is not None), *alone)


def _names(path: Any) -> list[str]:
    """Of the modules on the way to a parameter, and its own."""
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
