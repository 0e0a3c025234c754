"""Which blocks of positions can see each other in rows of packed documents, found once for a batch.

Two positions of different blocks can share a segment only where the blocks' intervals [smallest id, largest id] meet.
For each block of GRAIN positions the first and the last such block bound what a kernel visits. Between them, blocks
that hold one and the same segment throughout need no comparison of ids: `ranges` also holds a run of such blocks. Ids
may be any integers in any order: what is skipped never holds a pair; ids that rise along the row, as packing makes
them, are what is skipped best. Keys may be other tokens than the queries, such as an earlier part of the same row: what
is found for blocks of queries bounds a walk over keys, and the reverse.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

GRAIN = 64
MULTIPLE = 256  # positions are padded to it: no kernel's tile is larger
QUERIES, KEYS = 0, 1  # the second axis of both arrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentMetadata:
    """Of queries and of keys: segment ids, padded, and for each block [first, end, first of run, end of run] in positions
    of the others.
    """

    ids: Int[Array, "B 2 P"]
    ranges: Int[Array, "B 2 P/64 4"]


def segment_metadata(segment_ids: Int[Array, "B S"], key_ids: Int[Array, "B S"] | None = None) -> SegmentMetadata:
    """What `flash_attention` needs of a batch's segment ids (0 = padding): make it once, outside the layers.

    `key_ids` are those of the keys, where keys are not the queries' own tokens.
    """
    queries = _padded(segment_ids)
    keys = queries if key_ids is None else _padded(key_ids)
    of_queries = of_keys = _ranges(queries, keys, own=key_ids is None)
    if key_ids is not None:
        of_keys = _ranges(keys, queries, own=False)
    return SegmentMetadata(jnp.stack([queries, keys], 1), jnp.stack([of_queries, of_keys], 1))


def _padded(ids: jax.Array) -> jax.Array:
    return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, -ids.shape[1] % MULTIPLE)))


def _ranges(ids: jax.Array, others: jax.Array, own: bool) -> jax.Array:
    """[B, blocks, 4] of the blocks of `ids`; `own`: the others are the same tokens."""
    blocks, other_blocks = (x.reshape(x.shape[0], -1, GRAIN) for x in (ids, others))
    run = _run(blocks) if own else _common_run(blocks, other_blocks)
    return jnp.stack([*_reach(blocks, other_blocks), *run], axis=-1)


def _reach(blocks: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, end) of the others whose ids' interval meets the block's own; (all, 0) where there is padding only."""
    (low, high), (others_low, others_high) = _intervals(blocks), _intervals(others)
    meet = (low[:, :, None] <= others_high[:, None, :]) & (others_low[:, None, :] <= high[:, :, None])
    index = jnp.arange(others.shape[1], dtype=jnp.int32)[None, None, :]
    first = jnp.min(jnp.where(meet, index, others.shape[1]), axis=-1)
    end = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
    return first * GRAIN, end * GRAIN


def _intervals(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    limit = jnp.iinfo(jnp.int32)
    low = jnp.min(jnp.where(blocks == 0, limit.max, blocks), axis=-1)
    return low, jnp.max(jnp.where(blocks == 0, limit.min, blocks), axis=-1)


def _whole(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest id of a block, and whether it is the id of one segment that fills the block."""
    low = jnp.min(blocks, axis=-1)
    return low, (low == jnp.max(blocks, axis=-1)) & (low != 0)


def _run(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, end) of the neighbouring blocks that hold the block's one segment only; (all, 0) if it is not so itself."""
    count = blocks.shape[1]
    low, whole = _whole(blocks)
    changes = (low[:, 1:] != low[:, :-1]) | ~whole[:, 1:] | ~whole[:, :-1]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    edge = jnp.ones((blocks.shape[0], 1), bool)
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], 1), index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], 1), index + 1, count), axis=1, reverse=True)
    return jnp.where(whole, first, count) * GRAIN, jnp.where(whole, end, 0) * GRAIN


def _common_run(blocks: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, end) of the first run of others that hold the block's one segment only; (all, 0) if there is none."""
    (low, whole), (others_low, others_whole) = _whole(blocks), _whole(others)
    same = whole[:, :, None] & others_whole[:, None, :] & (low[:, :, None] == others_low[:, None, :])
    there, chosen = same.any(axis=-1), jnp.argmax(same, axis=-1)
    first, end = (jnp.take_along_axis(edge, chosen, axis=1) for edge in _run(others))
    return jnp.where(there, first, others.shape[1] * GRAIN), jnp.where(there, end, 0)
