"""What a kernel of this folder is compiled for: one value, which its parts take whole, and what follows from it."""

from dataclasses import dataclass

import jax.numpy as jnp

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}  # codes of the 8-bit dtypes


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Sizes:
    """Of the cache, and of the new positions that are put into it."""

    batch: int
    new: int  # positions of a row
    heads: int
    kv_heads: int
    capacity: int
    depth: int  # of a head
    stored: str  # the dtype of keys and values in the cache

    @property
    def largest(self) -> float:
        """The largest code; 0 where keys and values are stored as they are."""
        return LARGEST.get(jnp.dtype(self.stored), 0.0)

    @property
    def coded(self) -> bool:
        return self.largest > 0

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def all_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    @property
    def lines(self) -> int:
        """Queries of a key head."""
        return self.new * self.group

    @property
    def half(self) -> int:
        return self.depth // 2

    @property
    def wide(self) -> int:
        """Columns of a head in registers."""
        return padded(self.depth)

    @property
    def tall(self) -> int:
        """Rows of queries in registers: as many as tensor cores take, at least."""
        return max(16, padded(self.lines))


@dataclass(frozen=True)
class Work(Sizes):
    factor: float  # what logits are multiplied by, to base 2
    window: int  # 0: none
    positions: int  # of a step
    pieces: int  # of a row
    span: int  # positions of a piece, at least
    ptx: bool = True  # False is for Triton's interpreter
