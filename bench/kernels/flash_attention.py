"""Attention of a Llama-3.1-8B layer (32 query heads, 8 key/value heads of 128): each pass against cuDNN's.

Flops are those of the pairs a causal order leaves, two matrix products forward and five backward; the ceiling is a
square bfloat16 matmul. The packed case holds 8 documents of 1024 tokens in a row of 8192.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.timing import device_time, matmul_rate
from pallas_kernels.flash_attention import attention_backward, attention_forward, segment_metadata

OP = "flash_attention"
HEADS, KV_HEADS, DEPTH = 32, 8, 128
SHAPES = {"8x2048": (8, 2048), "1x8192": (1, 8192), "1x32768": (1, 32768)}
PACKED = 8  # documents


def rows() -> list[dict[str, Any]]:
    results = []
    for name, (batch, length) in SHAPES.items():
        arrays = _inputs(batch, length)
        flops = 4 * batch * HEADS * DEPTH * length**2 / 2
        implementations = (None, "cudnn") if length > 8192 else (None, "triton", "cudnn")
        results += _measure(f"causal {name}", implementations, arrays, flops)
    arrays, ids = _inputs(1, 8192), jnp.repeat(jnp.arange(1, 1 + PACKED, dtype=jnp.int32), 8192 // PACKED)[None]
    flops = 4 * HEADS * DEPTH * 8192**2 / 2 / PACKED
    return results + _measure(
        f"{PACKED} packed 1x8192", (None, "triton"), arrays, flops, segment_ids=segment_metadata(ids)
    )


def _inputs(batch: int, length: int) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jax.random.normal(key, (batch, length, n, DEPTH), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)]


def _passes(implementation: str | None, **options: Any) -> dict[str, tuple[Callable, float]]:
    """What to time, and its flops as a multiple of the forward pass's."""

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
        return attention_forward(q, k, v, implementation=implementation, **options)[0]

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        out, saved = attention_forward(q, k, v, implementation=implementation, **options)
        return out, *attention_backward(saved, g)

    return {"forward": (forward, 1.0), "forward+backward": (both, 3.5)}


def _measure(
    case: str, implementations: tuple[str | None, ...], arrays: list[jax.Array], flops: float, **options: Any
) -> list[dict[str, Any]]:
    results, ceiling = [], matmul_rate() / 1e12
    for implementation in implementations:
        for name, (function, share) in _passes(implementation, **options).items():
            seconds = device_time(function, *arrays)
            rate = share * flops / seconds / 1e12
            results.append(
                {
                    "op": OP,
                    "case": f"{case} {name}",
                    "implementation": implementation or "chosen",
                    "us": round(seconds * 1e6, 1),
                    "TFLOP/s": round(rate, 1),
                    "ceiling": round(ceiling, 1),
                    "ratio": round(rate / ceiling, 3),
                    "flops_per_byte": share * flops / (2 * sum(a.size for a in arrays)),
                }
            )
    return results
