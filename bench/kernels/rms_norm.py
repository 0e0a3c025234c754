"""The norm of 16384 rows of 4096, forward and backward with the residual's gradient added."""

from typing import Any

import jax

from bench.kernels._bandwidth import compare, normal
from pallas_kernels.rms_norm import rms_norm_backward, rms_norm_forward

TOKENS, WIDTH = 16384, 4096
BYTES = 2 * TOKENS * WIDTH


def rows() -> list[dict[str, Any]]:
    def make(seed: int) -> list[jax.Array]:
        return normal(seed, (TOKENS, WIDTH), (WIDTH,), (TOKENS, WIDTH), (TOKENS, WIDTH))

    def forward(implementation):
        return lambda x, weight, *_: rms_norm_forward(x, weight, 1e-5, implementation=implementation)

    def backward(implementation):
        return lambda x, weight, g, residual: rms_norm_backward(
            x, weight, 1e-5, g, residual, implementation=implementation
        )

    names = ("triton", "xla")
    return compare("rms_norm", "forward", 2 * BYTES, make, {name: forward(name) for name in names}) + compare(
        "rms_norm", "backward", 4 * BYTES, make, {name: backward(name) for name in names}
    )
