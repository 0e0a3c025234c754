"""Which attention weights dropout keeps: a hash of seed, head, query and key, the same in every implementation.

Nothing is stored and no order of evaluation matters: each kernel makes the bits it needs again from four integers.
"""

import jax
import jax.numpy as jnp


def threshold(rate: float) -> int:
    """How many of 2^24 hashes drop the weight."""
    return round(rate * 2**24)


def rate_of(rate: float) -> float:
    """The rate that the hashes really give."""
    return threshold(rate) / 2**24


def mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def kept(seed: jax.Array, batch: int, heads: int, length: int, rate: float) -> jax.Array:
    """bool [B, N, S, S]."""
    index = jnp.arange(length, dtype=jnp.uint32)
    head = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1)
    key = mixed(index[None, None, :] + mixed(head + seed.astype(jnp.uint32)))
    word = mixed(key[..., None] ^ (index * jnp.uint32(0x9E3779B1))[None, None, None, :])
    return (word >> 8).astype(jnp.int32) >= threshold(rate)
