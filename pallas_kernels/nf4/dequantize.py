"""Unpacking NF4: w = level[code] * scale, rounded to float32 and from there to the dtype asked for.

Under double quantisation the scale is itself round(map[code] * nested scale) + offset, rounded again. Each of these
roundings happens by itself, as in bitsandbytes, so the two operations must not be fused into one multiply-add. An
integer operation between them prevents that at no cost: the product's bits are OR-ed with a value that is zero for
every number, which the compiler cannot know.

Denormals. float32 and float16 results underflow gradually. bfloat16 results below 2^-126 become zeros of their sign
where `in` is a multiple of 16, because the instruction that bitsandbytes' CPU backend rounds such rows with does so;
other widths go through its scalar code, which keeps them.

XLA's CPU backend reads and writes denormals as zero. There the values are computed in float64 (float_bits.py), whose
product of a level and a scale is exact. Elsewhere one float32 product a value does.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.nf4.array import NF4Array, check_nf4, check_packed
from pallas_kernels.nf4.codebook import BLOCK, NESTED_BLOCK, NF4_LEVELS, dynamic_map
from pallas_kernels.nf4.float_bits import EXPONENT, MAGNITUDE, SIGN, f32_to_f64, f64_to_f32, round_to_f32
from pallas_kernels.nf4.unpack import unpack, unpack_obstacle

FLOATS = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def dequantize_nf4(
    q: NF4Array, dtype: Any = jnp.bfloat16, *, implementation: str | None = None
) -> Float[Array, "*stack out in"]:
    """The weight [..., out, in] that q stands for.

    Args:
        q: a packed weight, or a stack of them.
        dtype: float32, bfloat16 or float16. Rounding goes through float32, whatever dtype was packed.
        implementation: "triton" (unpack.py; layout "rows") or "xla".
    """
    check_packed("dequantize_nf4", q)
    chosen = choose_implementation("dequantize_nf4", implementation, {"triton": unpack_obstacle(q), "xla": None})
    check_nf4(q)
    dtype = jnp.dtype(dtype)
    if dtype not in FLOATS:
        raise TypeError(f"dequantize_nf4 gives float32, bfloat16 or float16, not {dtype=}.")
    return _unpack_all(q, dtype) if chosen == "triton" else _dequantize(q, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _unpack_all(q: NF4Array, dtype: jnp.dtype) -> jax.Array:
    lead = q.shape[:-2]
    stack = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), q)
    return unpack([stack], jnp.arange(math.prod(lead), dtype=jnp.int32), dtype).reshape(q.shape)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: NF4Array, dtype: jnp.dtype) -> jax.Array:
    return lax.platform_dependent(
        q, cpu=functools.partial(_in_float64, dtype=dtype), default=functools.partial(_in_float32, dtype=dtype)
    )


# One value: a level, a scale, their product, its rounding.


def _in_float32(q: NF4Array, dtype: jnp.dtype) -> jax.Array:
    return _round(_map_blocks(q, block_scales(q), lambda codes, scale: _level(codes) * scale), q, dtype)


def _in_float64(q: NF4Array, dtype: jnp.dtype) -> jax.Array:
    with jax.enable_x64(True):
        scales = _block_scales_f64(q)
        w = _map_blocks(q, scales, lambda codes, scale: f64_to_f32(_level(codes).astype(jnp.float64) * scale))
        return _round(w, q, dtype)


def _level(codes: jax.Array) -> jax.Array:
    """Codes 0..15 -> float32 levels, by four rounds of selection, which vectorise where a table look-up would not.

    They select among the levels' bits. The first round chooses between constants, and does so by masking: where() would
    broadcast each of the sixteen to the size of the weight, which a scan's backward would then keep as loop constants.
    """
    bits = [int(level) for level in NF4_LEVELS.view(np.uint32)]
    odd = jnp.uint32(0) - (codes & 1).astype(jnp.uint32)
    values = [np.uint32(low) ^ (odd & np.uint32(low ^ high)) for low, high in zip(bits[::2], bits[1::2], strict=True)]
    for bit in (2, 4, 8):
        chosen = (codes & bit) != 0
        values = [jnp.where(chosen, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return lax.bitcast_convert_type(values[0], jnp.float32)


def _round(w: jax.Array, q: NF4Array, dtype: jnp.dtype) -> jax.Array:
    """float32 -> dtype, rounded to nearest even.

    The rounding is made explicitly and the conversion is then exact, since a compiler may drop a narrowing conversion
    when a widening one follows.
    """
    if dtype == jnp.float32:
        return w
    if dtype == jnp.float16:
        # Below 2^-14 the spacing is 2^-24. Not by adding and taking away 1/2: XLA would simplify that to nothing.
        denormal = lax.round(w * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
        return jnp.where(jnp.abs(w) < 2.0**-14, denormal, lax.reduce_precision(w, 5, 10)).astype(dtype)
    rounded = lax.reduce_precision(w, 8, 7)
    if q.shape[-1] % 16 == 0:
        bits = lax.bitcast_convert_type(w, jnp.uint32)
        zero = lax.bitcast_convert_type(bits & SIGN, jnp.float32)
        rounded = jnp.where((bits & EXPONENT) == 0, zero, rounded)
    return rounded.astype(dtype)


# Scales of blocks.


def block_scales(q: NF4Array) -> jax.Array:
    """float32 scales of all blocks, shaped like q.scales."""
    if q.nested_scales is None or q.offset is None:
        return q.scales
    nested = _nested_scales(q)
    product = jnp.asarray(_nested_map(q))[q.scales] * nested
    magnitude = lax.bitcast_convert_type(nested, jnp.uint32) & MAGNITUDE
    zero = (magnitude > EXPONENT).astype(jnp.uint32)  # 1 for a NaN only
    product = lax.bitcast_convert_type(lax.bitcast_convert_type(product, jnp.uint32) | zero, jnp.float32)
    return product + _like_scales(q, q.offset)


def _block_scales_f64(q: NF4Array) -> jax.Array:
    """The same, as float64 that holds denormals."""
    if q.nested_scales is None or q.offset is None:
        return f32_to_f64(q.scales)
    entries = f32_to_f64(jnp.asarray(_nested_map(q))[q.scales])
    product = round_to_f32(entries * f32_to_f64(_nested_scales(q)))
    return round_to_f32(product + _like_scales(q, f32_to_f64(q.offset)))


def _nested_map(q: NF4Array) -> np.ndarray:
    return dynamic_map() if q.nested_map is None else np.array(q.nested_map, np.float32)


def _like_scales(q: NF4Array, offset: jax.Array) -> jax.Array:
    """One offset a matrix [...], spread over the matrix's scales."""
    matrix_axes = q.scales.ndim - offset.ndim
    return jnp.broadcast_to(offset.reshape(*offset.shape, *[1] * matrix_axes), q.scales.shape)


def _nested_scales(q: NF4Array) -> jax.Array:
    """The nested scale of each block, shaped like q.scales: every cell's value, repeated over the cell."""
    nested = q.nested_scales
    assert nested is not None
    if q.layout == "flat":
        spread = _repeat(nested, -1, NESTED_BLOCK)
        return spread[..., : q.scales.shape[-1]]
    assert q.nested_cell is not None
    rows, columns = q.nested_cell
    out, scale_columns = q.scales.shape[-2:]
    across = scale_columns if nested.shape[-1] == 1 else columns
    return _repeat(_repeat(nested, -1, across), -2, rows)[..., :out, :]


def _repeat(x: jax.Array, axis: int, times: int) -> jax.Array:
    """jnp.repeat as a broadcast, which fuses."""
    axis %= x.ndim
    expanded = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], times, *x.shape[axis + 1 :]))
    return expanded.reshape(*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])


# Blocks.


def _map_blocks(q: NF4Array, scales: jax.Array, function: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """function(codes [..., m], scale [..., 1]) of every block, arranged as the logical weight."""
    lead = q.shape[:-2]
    if q.layout == "rows":
        blocks = q.codes.reshape(*scales.shape, BLOCK // 2)
        return function(_nibbles(blocks), scales[..., None]).reshape(q.shape)
    full = q.codes.shape[-1] // (BLOCK // 2)
    whole, rest = q.codes[..., : full * (BLOCK // 2)], q.codes[..., full * (BLOCK // 2) :]
    blocks = whole.reshape(*lead, full, BLOCK // 2)
    parts = [function(_nibbles(blocks), scales[..., :full, None]).reshape(*lead, -1)] if full else []
    if rest.shape[-1]:
        parts.append(function(_nibbles(rest), scales[..., full:]))
    return jnp.concatenate(parts, axis=-1).reshape(q.shape)


def _nibbles(packed: jax.Array) -> jax.Array:
    """Bytes [..., m/2] -> codes [..., m]: low nibbles, then high ones; as a broadcast shift, which fuses."""
    shift = jnp.array([0, 4], jnp.uint8).reshape(*[1] * (packed.ndim - 1), 2, 1)
    return ((packed[..., None, :] >> shift) & 15).reshape(*packed.shape[:-1], -1)
