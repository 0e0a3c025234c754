"""Llama-3.1-8B's q/k/v product of 16384 tokens, turned and split in one pass, and back.

The public op, over q alone, is plain XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._bandwidth import compare, normal
from pallas_kernels.rope import apply_rope, rope_angles, rope_qkv, rope_qkv_backward

BATCH, LENGTH, HEADS, KV_HEADS, DEPTH = 8, 2048, 32, 8, 128
TOKENS, WIDTH = BATCH * LENGTH, (HEADS + 2 * KV_HEADS) * DEPTH
BYTES = 2 * 2 * TOKENS * WIDTH + 2 * 4 * TOKENS * DEPTH // 2  # in and out, and the angles


def rows() -> list[dict[str, Any]]:
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
    angles = rope_angles(positions, 500000.0 ** -jnp.arange(0, 1, 2 / DEPTH))

    def product(seed: int) -> list[jax.Array]:
        return [*normal(seed, (TOKENS, WIDTH)), *angles]

    def gradients(seed: int) -> list[jax.Array]:
        heads = (HEADS, KV_HEADS, KV_HEADS)
        return [*normal(seed, *((BATCH, LENGTH, count, DEPTH) for count in heads)), *angles]

    def forward(implementation):
        return lambda x, cos, sin: rope_qkv(x, cos, sin, HEADS, KV_HEADS, implementation=implementation)

    def backward(implementation):
        return lambda *arrays: rope_qkv_backward(*arrays, implementation=implementation)

    def queries(seed: int) -> list[jax.Array]:
        return [*normal(seed, (BATCH, LENGTH, HEADS, DEPTH)), *angles]

    alone = 2 * 2 * TOKENS * HEADS * DEPTH + 2 * 4 * TOKENS * DEPTH // 2
    results = compare("rope", "q alone", alone, queries, {"xla": apply_rope})
    names = ("triton", "xla")
    return (
        results
        + compare("rope", "forward", BYTES, product, {name: forward(name) for name in names})
        + compare("rope", "backward", BYTES, gradients, {name: backward(name) for name in names})
    )
