"""Keys and values of all positions so far: allocated ahead, written in place, grown by doubling.

Every row of a batch lies at its left end and is as long as it is; what lies past it is never read. Sizes are powers of two,
so that programs are compiled for few of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastjax.models.config import LlamaConfig

SMALLEST = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array a layer, so that a step writes each where it lies."""

    keys: tuple[Float[Array, "B K C D"], ...]
    values: tuple[Float[Array, "B K C D"], ...]
    lengths: Int[Array, "B"]  # positions that each row holds

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


def bucket(length: int) -> int:
    """The capacity for so many positions."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def empty_cache(config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
    return KVCache(keys, values, jnp.zeros(batch, jnp.int32))


def grown(cache: KVCache, capacity: int) -> KVCache:
    """The same with room for more."""
    more = ((0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0))
    keys, values = (tuple(jnp.pad(x, more) for x in side) for side in (cache.keys, cache.values))
    return KVCache(keys, values, cache.lengths)


def written(
    cache: Float[Array, "B K C D"], new: Float[Array, "B T K D"], lengths: Int[Array, "B"]
) -> Float[Array, "B K C D"]:
    """One layer's cache with new positions behind those of each row; what does not fit is left out."""
    rows, count = jnp.arange(new.shape[0]), jnp.arange(new.shape[1], dtype=lengths.dtype)
    places = lengths[:, None] + count[None]
    return cache.at[rows[:, None], :, places].set(new.astype(cache.dtype), mode="drop")
