"""Products with a few rows against unpacking first and against a bfloat16 weight; bytes are the packed weight's.

Eight weights take turns, 240 MB of them, so that none is found in the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.dequantize_nf4 import row
from bench.kernels.timing import device_time
from pallas_kernels.nf4 import dequantize_nf4, nf4_matvec, quantize_nf4

OP = "nf4_matvec"
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
ROWS = (1, 4, 16)
WEIGHTS = 8


def rows() -> list[dict[str, Any]]:
    results = []
    for out, width in SHAPES:
        keys = jax.random.split(jax.random.key(0), WEIGHTS)
        qs = [quantize_nf4(jax.random.normal(key, (out, width), jnp.bfloat16)) for key in keys]
        dense = [dequantize_nf4(q) for q in qs[:2]]
        for count in ROWS:
            x = jax.random.normal(jax.random.key(1), (count, width), jnp.bfloat16)
            case, moved = f"{count} x {out}x{width}", qs[0].nbytes
            for name in ("triton", "xla"):
                seconds = device_time(
                    lambda x, q: nf4_matvec(x, q, implementation=name),  # noqa: B023
                    *(x, qs[0]),
                    more=[(x, q) for q in qs[1:]],
                )
                results.append(row(OP, case, name, seconds, moved))
            seconds = device_time(_product, x, dense[0], more=[(x, dense[1])])
            results.append(row(OP, case, "bfloat16 weight", seconds, moved))
    return results


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
