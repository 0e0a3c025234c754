"""Packing to NF4 on the device, by kernel and in plain jnp. Bytes are those of the input: the bar is 1 TB/s of them."""

from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.dequantize_nf4 import row
from bench.kernels.timing import device_time
from pallas_kernels.nf4 import quantize_nf4

OP = "quantize_nf4"
SHAPE = (14336, 4096)


def rows() -> list[dict[str, Any]]:
    results = []
    for dtype in (jnp.bfloat16, jnp.float32):
        w = jax.random.normal(jax.random.key(0), SHAPE, dtype)
        for double_quant in (True, False):
            case = f"{SHAPE[0]}x{SHAPE[1]} {jnp.dtype(dtype).name}, {'double' if double_quant else 'single'}-quantised"
            for name in ("triton", "xla"):
                seconds = device_time(
                    lambda w: quantize_nf4(w, double_quant=double_quant, implementation=name),  # noqa: B023
                    w,
                    calls=6,
                )
                results.append(row(OP, case, name, seconds, w.nbytes))
    return results
