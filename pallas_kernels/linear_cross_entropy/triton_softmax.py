"""Launches the Triton kernels: `softmax`'s functions with the same arguments and results."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.options import Options
from pallas_kernels.linear_cross_entropy.softmax import Statistics
from pallas_kernels.triton_call import triton_call
from pallas_kernels.tuning import choice


@dataclass(frozen=True)
class Tiles:
    """How much of a row a program takes at a time."""

    block: int  # logits
    num_warps: int

    def __post_init__(self) -> None:
        if self.block & (self.block - 1) or self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{self.block=} must be a power of two and {self.num_warps=} one of at most 32.")


def walking_tiles(vocabulary: int) -> Tiles:
    """Of a program that walks along its row: 136 to 157 us for 1024 x 128256 on an H200, whatever the tiles."""
    return _for(vocabulary, "walking", Tiles(block=4096, num_warps=16))


def resident_tiles(vocabulary: int) -> Tiles:
    """Of a program that holds its part: 32 registers a thread. 233 us for 1024 x 128256 on an H200; 16384, 16: 267 us."""
    return _for(vocabulary, "resident", Tiles(block=4096, num_warps=4))


def _for(vocabulary: int, kind: str, default: Tiles) -> Tiles:
    tiles = choice(f"linear_cross_entropy.{kind}", default, vocabulary=vocabulary)
    fitting = max(64, 1 << (vocabulary - 1).bit_length())
    return tiles if fitting >= tiles.block else Tiles(block=fitting, num_warps=4)


def _walk(logits: jax.Array, options: Options) -> dict[str, Any]:
    rows, vocabulary = logits.shape
    tiles = walking_tiles(vocabulary)
    constants = {"VOCABULARY": vocabulary, "CAP": options.soft_cap or 0.0, "BLOCK": tiles.block}
    return {"grid": (rows,), "num_warps": tiles.num_warps} | constants


def _slopes(options: Options) -> dict[str, Any]:
    return {"PEAK": options.peak, "UNIFORM": options.uniform, "Z": options.z_loss}


def _per_row(logits: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32)


def row_statistics(logits: jax.Array, labels: jax.Array, options: Options) -> Statistics:
    from pallas_kernels.linear_cross_entropy.triton_kernels import statistics_kernel

    out, smoothed = [_per_row(logits)] * 3, options.label_smoothing != 0
    return Statistics(
        *triton_call(statistics_kernel, logits, labels, out=out, TOTAL=smoothed, **_walk(logits, options))
    )


def logit_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, lse: jax.Array, dtype: jnp.dtype, options: Options
) -> jax.Array:
    from pallas_kernels.linear_cross_entropy.triton_kernels import gradient_kernel

    out, constants = jax.ShapeDtypeStruct(logits.shape, dtype), _walk(logits, options) | _slopes(options)
    return triton_call(gradient_kernel, logits, labels, scale, lse, out=out, **constants)


def statistics_and_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, dtype: jnp.dtype, options: Options
) -> tuple[Statistics, jax.Array]:
    from pallas_kernels.linear_cross_entropy.triton_kernels import softmax_kernel

    rows, vocabulary = logits.shape
    tiles = resident_tiles(vocabulary)
    parts = -(-vocabulary // tiles.block)
    arrivals = jax.ShapeDtypeStruct((rows + 1,), jnp.int32)
    partial = jax.ShapeDtypeStruct((rows, parts), jnp.float32)
    outputs = triton_call(
        softmax_kernel,
        logits,
        labels,
        scale,
        jnp.zeros(arrivals.shape, arrivals.dtype),
        out=[*[_per_row(logits)] * 3, jax.ShapeDtypeStruct(logits.shape, dtype), arrivals, partial, partial],
        aliases={3: 4},
        grid=(rows * parts,),
        num_warps=tiles.num_warps,
        ROWS=rows,
        VOCABULARY=vocabulary,
        CAP=options.soft_cap or 0.0,
        BLOCK=tiles.block,
        **_slopes(options),
    )
    return Statistics(*outputs[:3]), outputs[3]
