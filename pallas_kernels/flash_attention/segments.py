"""Which blocks of positions can see each other in rows of packed documents, found once for a batch.

Two positions of different blocks can share a segment only where the blocks' intervals [smallest id, largest id] meet.
For each block of GRAIN positions the first and the last such block bound what a kernel visits. Between them, blocks
that hold one and the same segment throughout need no comparison of ids: `ranges` also holds the run of such blocks
around each block. Ids may be any integers in any order: what is skipped never holds a pair; ids that rise along the
row, as packing makes them, are what is skipped best. Both bounds hold from queries to keys and from keys to queries.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

GRAIN = 64
MULTIPLE = 256  # positions are padded to it: no kernel's tile is larger


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentMetadata:
    """Segment ids, padded, and for each block [first, end, first of run, end of run] in positions."""

    ids: Int[Array, "B P"]
    ranges: Int[Array, "B P/64 4"]


def segment_metadata(segment_ids: Int[Array, "B S"]) -> SegmentMetadata:
    """What `flash_attention` needs of a batch's segment ids (0 = padding): make it once, outside the layers."""
    length = segment_ids.shape[1]
    ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, -length % MULTIPLE)))
    blocks = ids.reshape(ids.shape[0], -1, GRAIN)
    return SegmentMetadata(ids, jnp.stack([*_reach(blocks), *_run(blocks)], axis=-1))


def _reach(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, end) of the blocks whose ids' interval meets the block's own; (all, 0) where there is padding only."""
    limit = jnp.iinfo(jnp.int32)
    low = jnp.min(jnp.where(blocks == 0, limit.max, blocks), axis=-1)
    high = jnp.max(jnp.where(blocks == 0, limit.min, blocks), axis=-1)
    meet = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    index = jnp.arange(blocks.shape[1], dtype=jnp.int32)[None, None, :]
    first = jnp.min(jnp.where(meet, index, blocks.shape[1]), axis=-1)
    end = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
    return first * GRAIN, end * GRAIN


def _run(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, end) of the neighbouring blocks that hold the block's one segment only; (all, 0) if it is not so itself."""
    count = blocks.shape[1]
    low = jnp.min(blocks, axis=-1)
    whole = (low == jnp.max(blocks, axis=-1)) & (low != 0)
    changes = (low[:, 1:] != low[:, :-1]) | ~whole[:, 1:] | ~whole[:, :-1]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    edge = jnp.ones((blocks.shape[0], 1), bool)
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], 1), index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], 1), index + 1, count), axis=1, reverse=True)
    return jnp.where(whole, first, count) * GRAIN, jnp.where(whole, end, 0) * GRAIN
