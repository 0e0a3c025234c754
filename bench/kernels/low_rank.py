"""LoRA's thin products at rank 16 on Llama-3.1-8B's linears, counting one reading of the large operand.

Results are z or dz, and dB, alone: in a model the large operand is extended in place, here that would copy it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._bandwidth import compare, normal
from pallas_kernels.low_rank import low_rank_gradients, room_for

RANK = 16
GROUPS = {"q/k/v": (4096, 1024, 1024), "down or o": (4096,), "gate/up": (14336, 14336)}


def rows() -> list[dict[str, Any]]:
    results = []
    for tokens in (4096, 16384):
        for name, widths in GROUPS.items():
            results += _gradients(f"dz and dB of {name}, {tokens} tokens", tokens, widths)
    return results


def _gradients(case: str, tokens: int, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    ranks, width = (RANK,) * len(widths), sum(widths)
    rank = sum(ranks)

    def make(seed: int) -> list[jax.Array]:
        return normal(seed, (tokens, rank), (tokens, width + room_for(rank)), (rank, width))

    def by(implementation):
        def function(z, g, b):
            scales = jnp.ones(rank, jnp.float32)
            out, db = low_rank_gradients(z, g, b, scales, ranks, widths, implementation=implementation)
            return out[:, width:], db

        return function

    return compare("low_rank", case, 2 * tokens * width, make, {name: by(name) for name in ("triton", "xla")})
