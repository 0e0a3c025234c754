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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
    """What a layer that is run again may find beside its input, so as not to attend again."""

    out: Float[Array, "B S N D"]
    lse: Float[Array, "B N S"]


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
