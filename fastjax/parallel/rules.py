"""Which mesh axes each logical axis of a parameter is split over: one table, read as data."""

from collections.abc import Sequence

from jax.sharding import Mesh, PartitionSpec

from fastjax.parallel.mesh import axis_size

# A weight is [out, in]. fsdp always splits the output side, so that a gathered shard is a run of whole rows; tensor
# splits the side that makes attention heads and MLP columns independent of one another.
OUTPUT_RULES = {
    "vocab": ("fsdp", "tensor"),
    "heads": ("fsdp", "tensor"),
    "kv_heads": ("fsdp", "tensor"),
    "mlp": ("fsdp", "tensor"),
    "embed": ("fsdp",),
}
INPUT_RULES = {"heads": ("tensor",), "mlp": ("tensor",), "embed": ()}
REPLICATED = ("norm",)


def partition_spec(axes: Sequence[str], mesh: Mesh) -> PartitionSpec:
    """How a parameter with these logical axes lies on the mesh; axes of size 1 are left out."""
    if tuple(axes) == REPLICATED or len(axes) == 1:
        return PartitionSpec()
    out, into = axes
    return PartitionSpec(_present(OUTPUT_RULES[out], mesh), _present(INPUT_RULES[into], mesh))


def _present(names: Sequence[str], mesh: Mesh) -> tuple[str, ...] | None:
    return tuple(name for name in names if axis_size(mesh, name) > 1) or None
