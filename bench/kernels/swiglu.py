"""silu(gate) * up of 16384 rows of 14336; backward makes the activation again in the same pass.

The public op, over separate arrays, is plain XLA: one fusion a pass, that reads and writes each array once.
"""

from typing import Any

import jax

from bench.kernels._bandwidth import both, compare, normal
from pallas_kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

TOKENS, WIDTH = 16384, 14336
BYTES = 2 * TOKENS * WIDTH


def rows() -> list[dict[str, Any]]:
    def product(seed: int) -> list[jax.Array]:
        return normal(seed, (TOKENS, 2 * WIDTH))

    def product_and_gradient(seed: int) -> list[jax.Array]:
        return normal(seed, (TOKENS, 2 * WIDTH), (TOKENS, WIDTH))

    def apart(seed: int) -> list[jax.Array]:
        return normal(seed, *((TOKENS, WIDTH),) * 3)

    def derivative(gate: jax.Array, up: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(swiglu, gate, up)[1](g)

    separate = {"xla": lambda gate, up, _: swiglu(gate, up)}
    results = compare("swiglu", "separate arrays, forward", 3 * BYTES, apart, separate)
    results += compare("swiglu", "separate arrays, backward", 5 * BYTES, apart, {"xla": derivative})
    return (
        results
        + compare("swiglu", "forward", 3 * BYTES, product, both(swiglu_forward))
        + compare("swiglu", "backward", 6 * BYTES, product_and_gradient, both(swiglu_backward))
    )
