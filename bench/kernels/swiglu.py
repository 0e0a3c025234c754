"""silu(gate) * up of 16384 rows of 14336; backward makes the activation again in the same pass."""

from typing import Any

import jax

from bench.kernels._bandwidth import both, compare, normal
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

TOKENS, WIDTH = 16384, 14336
BYTES = 2 * TOKENS * WIDTH


def rows() -> list[dict[str, Any]]:
    def product(seed: int) -> list[jax.Array]:
        return normal(seed, (TOKENS, 2 * WIDTH))

    def product_and_gradient(seed: int) -> list[jax.Array]:
        return normal(seed, (TOKENS, 2 * WIDTH), (TOKENS, WIDTH))

    return compare("swiglu", "forward", 3 * BYTES, product, both(swiglu_forward)) + compare(
        "swiglu", "backward", 6 * BYTES, product_and_gradient, both(swiglu_backward)
    )
