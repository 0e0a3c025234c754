"""Unpacking NF4 to bfloat16 against the plain-jnp path and a 16-entry gather; bytes are codes, scales and the result.

All three have to give the same bits. Weights are those of an MLP, either way round, and of an attention's output.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._check import same, verified
from bench.kernels.timing import copy_bandwidth, times_in_turns
from pallas_kernels.nf4 import NF4Array, dequantize_nf4, quantize_nf4
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS

OP = "dequantize_nf4"
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
CASES = (("double-quantised", True, jnp.bfloat16), ("single-quantised", False, jnp.bfloat16))


def rows() -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES:
        for kind, double_quant, dtype in CASES:
            q = quantize_nf4(jax.random.normal(jax.random.key(0), shape, dtype), double_quant=double_quant)
            moved = q.nbytes + q.size * jnp.dtype(dtype).itemsize
            case = f"{shape[0]}x{shape[1]}, {kind}"
            functions: dict[str, Callable] = {
                name: partial(dequantize_nf4, dtype=dtype, implementation=name) for name in ("triton", "xla")
            }
            if not double_quant:
                functions["gather"] = _gather
            calls = {name: partial(jax.jit(function), q) for name, function in functions.items()}
            expected = calls["xla"]()
            able, failed = verified(OP, case, calls, partial(same, expected=expected))
            seconds = times_in_turns(able)
            results += failed + [row(OP, case, name, each, moved) for name, each in seconds.items()]
    return results


def _gather(q: NF4Array) -> jax.Array:
    """What one would write by hand."""
    packed = q.codes.reshape(*q.scales.shape, BLOCK // 2)
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
    return (jnp.asarray(NF4_LEVELS)[codes] * q.scales[..., None]).astype(jnp.bfloat16).reshape(q.shape)


def row(op: str, case: str, implementation: str, seconds: float, moved: int) -> dict[str, Any]:
    """A memory-bound op's row: bytes per second against those of a copy."""
    rate, ceiling = moved / seconds / 1e9, copy_bandwidth() / 1e9
    return {
        "op": op,
        "case": case,
        "implementation": implementation,
        "us": round(1e6 * seconds, 2),
        "GB/s": round(rate, 1),
        "ceiling": round(ceiling, 1),
        "ratio": round(rate / ceiling, 3),
    }
