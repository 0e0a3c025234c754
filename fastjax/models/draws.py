"""Random numbers by place: what is drawn for a token and a column follows from the key and from where in the batch they are.

A device that has some rows of a batch, some tokens of a row or some columns draws the numbers that one device with all of
them would have drawn there: dropout and noise do not depend on how work is divided. A hash of a few operations, which XLA
computes where the numbers are used, takes the place of jax.random, whose draws depend on the shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.flash_attention.dropout import mixed

ODD = 0x9E3779B1  # spreads neighbouring columns over all bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """What is drawn for some rows and columns of a matrix [tokens of the batch, columns]."""

    key: jax.Array
    places: UInt32[Array, "T"]  # of the rows, in the batch as a whole
    first_column: Int[Array, ""]

    def bits(self, columns: int) -> UInt32[Array, "T columns"]:
        first, second = jax.random.bits(self.key, (2,), jnp.uint32)
        column = (self.first_column + jnp.arange(columns, dtype=jnp.int32)).astype(jnp.uint32) * jnp.uint32(ODD)
        rows = mixed(self.places + first)
        return mixed(mixed(rows[:, None] ^ column[None]) + second)

    def uniform(self, columns: int) -> Float[Array, "T columns"]:
        """In [0, 1), float32, in steps of 2^-24."""
        return (self.bits(columns) >> 8).astype(jnp.float32) * jnp.float32(2**-24)

    def kept(self, columns: int, rate: float) -> Bool[Array, "T columns"]:
        """False with probability `rate`."""
        return self.uniform(columns) >= rate


def draw(key: jax.Array, places: UInt32[Array, "T"], first_column: jax.Array | int = 0) -> Draw:
    return Draw(key, places, jnp.asarray(first_column, jnp.int32))


def places_of(rows: int, length: int, first_row: jax.Array | int = 0) -> UInt32[Array, "rows length"]:
    """Of each token of some rows, by the row's index in the batch and the token's in its row."""
    row = jnp.asarray(first_row, jnp.uint32) + jnp.arange(rows, dtype=jnp.uint32)
    return row[:, None] * jnp.uint32(length) + jnp.arange(length, dtype=jnp.uint32)[None]
