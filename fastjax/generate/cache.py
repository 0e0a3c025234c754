"""Keys and values of all positions so far: allocated ahead, written in place, grown by doubling.

Every row of a batch lies at its left end and is as long as it is; what lies past it is never read. Sizes are powers of two,
so that programs are compiled for few of them. Layers lie in one stack: pallas_kernels.decode_attention says how, and how
they are stored in 8 bits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastjax.errors import UserError
from fastjax.models.config import LlamaConfig
from pallas_kernels.decode_attention import KVStack, storage_obstacle

SMALLEST = 64
EIGHT_BITS = ("int8", "float8_e4m3fn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The stack of all layers, and how much of it each row fills."""

    stack: KVStack
    lengths: Int[Array, "B"]  # positions that each row holds

    @property
    def capacity(self) -> int:
        return self.stack.capacity


def bucket(length: int) -> int:
    """The capacity for so many positions."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def storage_dtype(name: str | None, model_dtype: jnp.dtype) -> jnp.dtype:
    """What `kv_cache_dtype` asks for: None is the model's own."""
    if name is None:
        return model_dtype
    if str(name) not in (*EIGHT_BITS, model_dtype.name):
        raise UserError(
            f"kv_cache_dtype={name!r} is not supported; use {' or '.join(EIGHT_BITS)}, or None for the model's own, "
            f"{model_dtype}."
        )
    dtype = jnp.dtype(name)
    obstacle = storage_obstacle(dtype)
    if obstacle:
        raise UserError(f"kv_cache_dtype={name!r} cannot be used here: {obstacle}; use int8.")
    return dtype


def empty_cache(config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    stack = KVStack.empty(config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim, dtype)
    return KVCache(stack, jnp.zeros(batch, jnp.int32))


def grown(cache: KVCache, capacity: int) -> KVCache:
    """The same with room for more."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, capacity - cache.capacity if axis == 3 else 0) for axis in range(x.ndim)])

    return KVCache(jax.tree.map(padded, cache.stack), cache.lengths)
