"""Launches the Triton kernels: `softmax`'s functions with the same arguments and results."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.options import Options
from pallas_kernels.linear_cross_entropy.softmax import Statistics
from pallas_kernels.triton_call import triton_call


@dataclass(frozen=True)
class Tiles:
    """How a program walks along its row."""

    block: int  # logits a step
    num_warps: int

    def __post_init__(self) -> None:
        if self.block & (self.block - 1) or self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{self.block=} must be a power of two and {self.num_warps=} one of at most 32.")


def choose_tiles(vocabulary: int) -> Tiles:
    return Tiles(4096, 16) if vocabulary >= 4096 else Tiles(max(64, 1 << (vocabulary - 1).bit_length()), 4)


def _launch(logits: jax.Array, options: Options) -> dict[str, Any]:
    tiles = choose_tiles(logits.shape[1])
    return {
        "grid": (logits.shape[0],),
        "num_warps": tiles.num_warps,
        "VOCABULARY": logits.shape[1],
        "CAP": options.soft_cap or 0.0,
        "BLOCK": tiles.block,
    }


def _slopes(options: Options) -> dict[str, Any]:
    return {"PEAK": options.peak, "UNIFORM": options.uniform, "Z": options.z_loss}


def _per_row(logits: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32)


def row_statistics(logits: jax.Array, labels: jax.Array, options: Options) -> Statistics:
    from pallas_kernels.linear_cross_entropy.triton_kernels import statistics_kernel

    out, smoothed = [_per_row(logits)] * 3, options.label_smoothing != 0
    return Statistics(
        *triton_call(statistics_kernel, logits, labels, out=out, TOTAL=smoothed, **_launch(logits, options))
    )


def logit_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, lse: jax.Array, dtype: jnp.dtype, options: Options
) -> jax.Array:
    from pallas_kernels.linear_cross_entropy.triton_kernels import gradient_kernel

    out, constants = jax.ShapeDtypeStruct(logits.shape, dtype), _launch(logits, options) | _slopes(options)
    return triton_call(gradient_kernel, logits, labels, scale, lse, out=out, **constants)


def statistics_and_gradients(
    logits: jax.Array, labels: jax.Array, scale: jax.Array, dtype: jnp.dtype, options: Options
) -> tuple[Statistics, jax.Array]:
    from pallas_kernels.linear_cross_entropy.triton_kernels import softmax_kernel

    out, constants = [_per_row(logits)] * 3, _launch(logits, options) | _slopes(options)
    out = [*out, jax.ShapeDtypeStruct(logits.shape, dtype)]
    lse, at_label, total, ds = triton_call(softmax_kernel, logits, labels, scale, out=out, **constants)
    return Statistics(lse, at_label, total), ds
