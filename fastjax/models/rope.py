"""Rotary frequencies, with the scalings that stretch a model beyond the context it was trained on.

A head's dimensions i and i + D/2 form a pair turned by the angle position * f_i, f_i = theta^(-2i/D). Scalings change f:

- linear: f / factor (positions squeezed into the old range);
- dynamic (NTK): a larger theta once the longest position of the batch passes the original context;
- llama3: high frequencies kept, low ones divided by factor, a linear blend between.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastjax.models.config import RopeConfig


def rope_frequencies(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B S"], rows_over: Sequence[str] = ()
) -> Float[Array, "half"]:
    """The angle per position of each pair, [head_dim / 2], in float32. Only `dynamic` looks at the positions, of all rows where
    the mesh axes `rows_over` divide them.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if rope.kind == "dynamic":
        last = jax.lax.pmax(positions.max(), rows_over) if rows_over else positions.max()
        length = jnp.maximum(last + 1, rope.original_max_position).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponents
    frequencies = 1.0 / (jnp.float32(rope.theta) ** exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: jax.Array) -> jax.Array:
    """Divide by `factor` the frequencies that turn less than low_freq_factor times within the original context."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
    long_waves = wavelengths > rope.original_max_position / rope.low_freq_factor
    short_waves = wavelengths < rope.original_max_position / rope.high_freq_factor
    return jnp.where(long_waves, frequencies / rope.factor, jnp.where(short_waves, frequencies, blended))


def default_positions(shape: tuple[int, ...], segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"]:
    """Positions that restart at 0 where a new segment begins."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # of constants XLA would make the maximum below itself, in S^2 steps: minutes for a long row
    if segment_ids is None:
        return index
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
