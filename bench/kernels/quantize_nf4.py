"""Packing to NF4 on the device, by kernel and in plain jnp. Bytes are those of the input: the bar is 1 TB/s of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._check import agree, same, verified
from bench.kernels.dequantize_nf4 import row
from bench.kernels.timing import times_in_turns
from pallas_kernels.nf4 import NF4Array, dequantize_nf4, quantize_nf4

OP = "quantize_nf4"
SHAPE = (14336, 4096)


def rows() -> list[dict[str, Any]]:
    results = []
    for dtype in (jnp.bfloat16, jnp.float32):
        w = jax.random.normal(jax.random.key(0), SHAPE, dtype)
        for double_quant in (True, False):
            case = f"{SHAPE[0]}x{SHAPE[1]} {jnp.dtype(dtype).name}, {'double' if double_quant else 'single'}-quantised"
            pack = partial(quantize_nf4, double_quant=double_quant)
            calls = {name: partial(jax.jit(partial(pack, implementation=name)), w) for name in ("triton", "xla")}
            expected = calls["xla"]()
            able, failed = verified(OP, case, calls, partial(_check, expected=expected))
            seconds = times_in_turns(able, rounds=5)
            results += failed + [row(OP, case, name, each, w.nbytes) for name, each in seconds.items()]
    return results


def _check(q: NF4Array, expected: NF4Array) -> None:
    """The same bits; but a double quantisation's offset is a mean, whose order of summation is the compiler's."""
    same(q.codes, expected.codes)
    if q.double_quant:
        agree(*(dequantize_nf4(each, jnp.float32, implementation="xla") for each in (q, expected)), bound=1e-5)
    else:
        same(q.scales, expected.scales)
