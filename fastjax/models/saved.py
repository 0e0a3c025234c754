"""What a decoder layer reads besides its parameters, and what it leaves to its backward pass, named as in decoder_layer.py."""

import dataclasses

import jax
from jaxtyping import Array, Float, UInt32

from fastjax.parallel.ring_attention import Ring, RingSaved
from pallas_kernels.flash_attention import AttentionSaved, SegmentMetadata


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a pass reads besides its parameters and its input."""

    cos: Float[Array, "B S D/2"]
    sin: Float[Array, "B S D/2"]
    seen: SegmentMetadata | Ring | None  # what queries see besides the causal order: a ring where rows are divided
    places: UInt32[Array, "T"] | None = None  # of the tokens in the batch as a whole, where something is drawn for them
    tensor: str | None = dataclasses.field(default=None, metadata={"static": True})  # the mesh axis that splits layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SavedAttention:
    """What the backward pass needs of the layer's first half."""

    x: Float[Array, "T H"]
    attention: AttentionSaved | RingSaved  # q, k, v, o, log-sum-exp
    low_rank: tuple[Float[Array, "T R"] | None, ...]  # of q/k/v and o


Turned = tuple[  # what attention reads, and the low-rank products on the way to it
    Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"], Float[Array, "T R"] | None
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
    """What a layer that is run again may find beside its input: attention's output, and what attention read."""

    out: Float[Array, "B S N D"]
    lse: Float[Array, "B N S"]
    qkv: Turned | None = None

    @classmethod
    def of(cls, saved: SavedAttention, *, with_qkv: bool) -> "Attended":
        attention = saved.attention
        return cls(attention.out, attention.lse, (*attention.qkv, saved.low_rank[0]) if with_qkv else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SavedMLP:
    """What the backward pass needs of the layer's second half, whose input is m."""

    gate_up: Float[Array, "T 2M"]
    low_rank: tuple[Float[Array, "T R"] | None, ...]  # of gate/up and down


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the backward pass needs of the forward pass."""

    first: SavedAttention
    m: Float[Array, "T H"]
    second: SavedMLP
