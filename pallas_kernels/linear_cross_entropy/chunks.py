"""Labelled rows packed to the front and walked in chunks; a chunk that holds no labelled row is not run.

Shapes stay static: `order` lists the labelled rows, then the others, and the loop over chunks ends after the last
labelled one, so that a batch with half its labels costs half as much. A chunk gathers its own rows (what lies past the
labelled ones are zeros); its results lie in packed order until `unpack` brings them back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tuning import choice

CHUNK_BYTES = 768 << 20  # of a chunk's logits and their gradient together


@dataclass(frozen=True)
class Limit:
    """Bytes that a chunk's logits and their gradient may take together."""

    bytes: int

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise ValueError(f"{self}: a chunk needs at least one byte.")


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows a chunk: as few chunks as the limit allows, equally large, multiples of 128 (a matmul tile) or of 8."""
    most = choice("linear_cross_entropy.chunk", Limit(CHUNK_BYTES), vocabulary=vocabulary)
    limit = max(8, most.bytes // ((4 + itemsize) * vocabulary))
    multiple = 128 if limit >= 128 else 8
    limit = limit // multiple * multiple
    if rows <= limit:
        return max(1, rows)
    even = -(-rows // -(-rows // limit))
    return -(-even // multiple) * multiple


class Packing(NamedTuple):
    order: jax.Array  # [chunks x chunk] which row lies at a packed place
    place: jax.Array  # [T] at which packed place a row lies
    labelled: jax.Array  # [T] whether it counts
    count: jax.Array  # [] how many do


def pack(labelled: jax.Array, chunk: int) -> Packing:
    rows = jnp.arange(labelled.shape[0], dtype=jnp.int32)
    before = jnp.cumsum(labelled, dtype=jnp.int32)  # labelled rows up to and with this one
    count = jnp.sum(labelled, dtype=jnp.int32)
    place = jnp.where(labelled, before - 1, count + rows - before)
    padded = -(-labelled.shape[0] // chunk) * chunk
    order = jnp.zeros(padded, jnp.int32).at[place].set(rows, unique_indices=True, mode="promise_in_bounds")
    return Packing(order, place, labelled, count)


class Chunk(NamedTuple):
    rows: jax.Array  # [chunk] their indices
    labelled: jax.Array  # [chunk] false for what only fills the chunk up

    def of(self, array: jax.Array) -> jax.Array:
        """The chunk's rows of an array [T, ...], zeros where there is none."""
        taken = array.at[self.rows].get(mode="promise_in_bounds")
        return jnp.where(self.labelled.reshape(-1, *[1] * (array.ndim - 1)), taken, jnp.zeros((), array.dtype))


def for_each_chunk(packing: Packing, chunk: int, body: Callable[[Chunk, jax.Array, Any], Any], carry: Any) -> Any:
    """carry = body(chunk, its first packed place, carry) over the chunks that hold a labelled row."""

    def step(index: jax.Array, carry: Any) -> Any:
        start = index * chunk
        rows = jax.lax.dynamic_slice_in_dim(packing.order, start, chunk)
        labelled = start + jnp.arange(chunk, dtype=jnp.int32) < packing.count
        return body(Chunk(rows, labelled), start, carry)

    chunks = packing.order.shape[0] // chunk
    if chunks <= 1:  # nothing to decide: no row can be left out of a loop that is none
        return step(jnp.int32(0), carry) if chunks else carry
    return jax.lax.fori_loop(jnp.int32(0), (packing.count + chunk - 1) // chunk, step, carry)


def write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)


def unpack(packed: jax.Array, packing: Packing) -> jax.Array:
    """Results in the rows' own order, 0 for rows without a label."""
    taken = packed.at[packing.place].get(mode="promise_in_bounds")
    labelled = packing.labelled.reshape(-1, *[1] * (packed.ndim - 1))
    return jnp.where(labelled, taken, jnp.zeros((), packed.dtype))
