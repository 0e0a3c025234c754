"""Which mesh axes each logical axis of a parameter is split over: one table, read as data."""

from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from fastjax.parallel.mesh import axis_size

# A weight is [out, in]. fsdp always splits the output side, so that a gathered shard is a run of whole rows; tensor
# splits the side that makes attention heads and MLP columns independent of one another. Where both split one side, tensor
# comes first: what is gathered over fsdp is then the run of heads, columns or words that a tensor device works on.
OUTPUT_RULES = {
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "kv_heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "embed": ("fsdp",),
}
INPUT_RULES = {"heads": ("tensor",), "mlp": ("tensor",), "embed": ()}
# A bias lies where its outputs are made, and is too small for fsdp to split.
VECTOR_RULES = {"heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "embed": (), "norm": ()}


def partition_spec(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter with these logical axes lies on the mesh; axes of size 1 are left out."""
    if len(axes) == 1:
        names = _present(VECTOR_RULES[axes[0]], mesh)
        return PartitionSpec(names) if names else PartitionSpec()
    out, into = axes
    return PartitionSpec(_present(OUTPUT_RULES[out], mesh), _present(INPUT_RULES[into], mesh))


def _present(names: Sequence[str], mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    return tuple(name for name in names if axis_size(mesh, name) > 1) or None
