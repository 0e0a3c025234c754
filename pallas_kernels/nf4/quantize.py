"""Packing a float weight to NF4, with the codes and scales that bitsandbytes gives, bit for bit.

A block of 64 values x has scale a = max |x|. With r = 1 / max(a, 1e-38) rounded to float32, a value's code is the
number of boundaries (midpoints of neighbouring levels) strictly below the float32 product x * r. A last, partial block
divides instead, code(x / a), and keeps the clamped a as its scale.

Double quantisation takes the mean of all scales as offset, and codes d = a - offset in runs of 256: with n = max |d|
and t = d * (1 / n), the cell of t in [-1, 1] (65536 equal ones) tells the code; all codes are 0 where n = 0. For the
mean see mean.py; in matrices of two million values or more its last bit may differ from that of the reference.

Exactness. Magnitudes are compared as integers. Everything once a block happens in float64 (float_bits.py). What
happens to every value is one float32 product, made safe from flushed denormals by a power of two: if a or r is near
either end of float32's range, x is scaled by k and r by 1/k, and the product is the same. A denormal x counts only in
a block whose scale is tiny, and there it is built from its mantissa. A product that is itself denormal is as good as
zero.

Memory. A matrix is packed part by part; temporaries are those of about two million values, whatever its size. In
layout "rows" a part takes every G-th row, so that no step crosses devices if W is sharded along `out` or, by blocks,
along `in`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.nf4.array import NF4Array, nested_cell_for, nested_grid
from pallas_kernels.nf4.codebook import (
    BLOCK,
    NESTED_BLOCK,
    NESTED_CELLS,
    nested_code_table,
    nf4_boundaries,
)
from pallas_kernels.nf4.float_bits import (
    EXPONENT,
    MAGNITUDE,
    MANTISSA,
    SIGN,
    bits_to_f64,
    f32_bits,
    f64_to_f32,
    round_to_f32,
)
from pallas_kernels.nf4.mean import float32_mean
from pallas_kernels.nf4.pack import pack_blocks, pack_obstacle

PART_VALUES = 1 << 21  # packed at a time
SMALLEST_SCALE = float(np.float32(1e-38))  # a float32 denormal: smaller scales are inverted as if they were this
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def all_finite(w: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether w holds no NaN or Inf, which NF4 cannot represent: ask before packing."""
    return jnp.all(jnp.isfinite(w))


def quantize_nf4(
    w: Float[Array, "*stack out in"], *, double_quant: bool = True, implementation: str | None = None
) -> NF4Array:
    """Packs a weight to NF4.

    Args:
        w: float32, bfloat16 or float16 [..., out, in], finite (see `all_finite`), an even number of values per matrix.
            Leading axes stack independent matrices.
        double_quant: compress the block scales to 8 bits too (4.127 instead of 4.5 bits a weight).
        implementation: "triton" (pack.py; `in` a multiple of 64) or "xla".

    Returns:
        An NF4Array in layout "rows" if `in` is a multiple of 64, else "flat".
    """
    if w.ndim < 2 or math.prod(w.shape) == 0:
        raise ValueError(f"quantize_nf4 packs matrices [..., out, in], but {w.shape=}; reshape it.")
    if w.dtype not in FLOATS:
        raise TypeError(f"quantize_nf4 packs float32, bfloat16 or float16, but {w.dtype=}; convert it.")
    if math.prod(w.shape[-2:]) % 2:
        raise ValueError(f"quantize_nf4 packs two values a byte, but {w.shape=} has an odd number of them; pad it.")
    chosen = choose_implementation("quantize_nf4", implementation, {"triton": pack_obstacle(w), "xla": None})
    return _quantize_by_kernel(w, double_quant) if chosen == "triton" else _quantize(w, double_quant)


@functools.partial(jax.jit, static_argnames="double_quant")
def _quantize_by_kernel(w: jax.Array, double_quant: bool) -> NF4Array:
    packed = pack_blocks(w)
    finish = functools.partial(_finish, shape=(w.shape[-2], w.shape[-1]), double_quant=double_quant)
    with jax.enable_x64(True):
        if w.ndim == 2:
            return finish(packed)
        stack = w.shape[:-2]
        matrices = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(stack) :]), packed)
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), lax.map(finish, matrices))


@functools.partial(jax.jit, static_argnames="double_quant")
def _quantize(w: jax.Array, double_quant: bool) -> NF4Array:
    with jax.enable_x64(True):
        if w.ndim == 2:
            return _quantize_matrix(w, double_quant)
        stack = w.shape[:-2]
        packed = lax.map(lambda matrix: _quantize_matrix(matrix, double_quant), w.reshape(-1, *w.shape[-2:]))
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), packed)


def _quantize_matrix(w: jax.Array, double_quant: bool) -> NF4Array:
    packed = _pack_rows(w) if w.shape[1] % BLOCK == 0 else _pack_flat(w.reshape(-1))
    return _finish(packed, (w.shape[0], w.shape[1]), double_quant)


def _finish(packed: tuple[jax.Array, jax.Array], shape: tuple[int, int], double_quant: bool) -> NF4Array:
    """Codes and bits of the block scales of a matrix of this shape, as an NF4Array."""
    (codes, scale_bits), (out, columns) = packed, shape
    rows = columns % BLOCK == 0
    layout: dict[str, Any] = {} if rows else {"layout": "flat", "flat_shape": (out, columns)}
    if not double_quant:
        return NF4Array(codes, lax.bitcast_convert_type(scale_bits, jnp.float32), None, None, **layout)
    scale_codes, nested, offset = _quantize_scales(scale_bits)
    if rows:
        layout = {"nested_cell": nested_cell_for(columns // BLOCK)}
        nested = nested_grid(nested, out, columns // BLOCK)
    return NF4Array(codes, scale_codes, nested, offset, **layout)


def _pack_rows(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W [out, in] -> codes [out, in/2], uint32 bits of the scales [out, in/64]."""
    out, columns = w.shape
    parts = _parts(out, PART_VALUES // columns)
    interleaved = w.reshape(out // parts, parts, columns)

    def pack_part(part: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = lax.dynamic_index_in_dim(interleaved, part, 1, keepdims=True)
        packed, bits = _pack_blocks(rows.reshape(*rows.shape[:2], -1, BLOCK))
        new = packed.reshape(*rows.shape[:2], -1), bits
        return jax.tree.map(lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, part, 1), carry, new)

    codes = jnp.zeros((out // parts, parts, columns // 2), jnp.uint8)
    bits = jnp.zeros((out // parts, parts, columns // BLOCK), jnp.uint32)
    codes, bits = lax.fori_loop(0, parts, pack_part, (codes, bits))
    return codes.reshape(out, -1), bits.reshape(out, -1)


def _parts(rows: int, most: int) -> int:
    """The smallest number of equal parts that `rows` can be cut into with at most `most` rows each (at least one)."""
    fewest = -(-rows // max(1, most))
    return next(parts for parts in range(fewest, rows + 1) if rows % parts == 0)


def _pack_flat(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values [n] in block order -> codes [n/2], uint32 bits of the scales [ceil(n/64)]."""
    full = values.size // BLOCK
    size = min(full, PART_VALUES // BLOCK)
    codes = jnp.zeros((values.size // 2,), jnp.uint8)
    bits = jnp.zeros((-(-values.size // BLOCK),), jnp.uint32)

    def pack_part(part: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(part * size, full - size)  # the last part may redo blocks of the one before
        blocks = lax.dynamic_slice_in_dim(values, first * BLOCK, size * BLOCK).reshape(size, BLOCK)
        packed, scale = _pack_blocks(blocks)
        return (
            lax.dynamic_update_slice_in_dim(carry[0], packed.reshape(-1), first * (BLOCK // 2), 0),
            lax.dynamic_update_slice_in_dim(carry[1], scale, first, 0),
        )

    if full:
        codes, bits = lax.fori_loop(0, -(-full // size), pack_part, (codes, bits))
    if values.size % BLOCK:
        packed, scale = _pack_partial(values[full * BLOCK :])
        codes = codes.at[full * BLOCK // 2 :].set(packed)
        bits = bits.at[full].set(scale)
    return codes, bits


def _pack_blocks(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whole blocks [..., 64] -> codes [..., 32], uint32 bits of their scales [...]."""
    bits = f32_bits(values)
    scale = jnp.max(bits & MAGNITUDE, axis=-1)
    k, inverse, denormal_unit = (factor[..., None] for factor in _block_factors(scale))
    mantissa = (bits & MANTISSA).astype(jnp.float32)
    denormal = jnp.where(bits >= SIGN, -mantissa, mantissa) * denormal_unit
    scaled = jnp.where((bits & EXPONENT) == 0, denormal, lax.bitcast_convert_type(bits, jnp.float32) * k)
    return _pair(_codes(scaled * inverse)), scale


def _block_factors(scale_bits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 (k, r / k, k * 2^-149) of each block: k keeps x * k and r / k clear of denormals where that matters.

    The third is what a denormal's mantissa counts; it is 0 where denormals are too small to count at all.
    """
    scale = jnp.maximum(bits_to_f64(scale_bits), SMALLEST_SCALE)
    inverse = round_to_f32(1.0 / scale)
    tiny, huge = scale < 2.0**-100, scale > 2.0**100
    k = jnp.where(tiny, 2.0**64, jnp.where(huge, 2.0**-64, 1.0))
    over_k = jnp.where(tiny, 2.0**-64, jnp.where(huge, 2.0**64, 1.0))
    denormal_unit = jnp.where(tiny, 2.0 ** (64 - 149), 0.0)
    return k.astype(jnp.float32), (inverse * over_k).astype(jnp.float32), denormal_unit.astype(jnp.float32)


def _pack_partial(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last block, of fewer than 64 values [m] -> codes [m/2], uint32 bits of its scale []."""
    value = bits_to_f64(f32_bits(values))
    scale = jnp.maximum(jnp.max(jnp.abs(value)), SMALLEST_SCALE)
    return _pair(_codes(round_to_f32(value / scale))), f32_bits(f64_to_f32(scale))


def _codes(normalised: jax.Array) -> jax.Array:
    """Values in [-1, 1] -> uint8 codes: how many boundaries are strictly below."""
    below = [(normalised > float(boundary)).astype(jnp.uint8) for boundary in nf4_boundaries()]
    return functools.reduce(jnp.add, below)


def _pair(codes: jax.Array) -> jax.Array:
    """Codes [..., m] -> bytes [..., m/2]: the first half in the low nibbles, the second in the high ones."""
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << 4)


def _quantize_scales(scale_bits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits of n scales -> uint8 codes of their shape, float32 nested scales [ceil(n/256)], float32 offset []."""
    scales = bits_to_f64(scale_bits).reshape(-1)
    offset = float32_mean(scales)
    centred = round_to_f32(scales - offset)
    runs = jnp.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(runs), axis=-1)
    inverse = round_to_f32(1.0 / nested)[:, None]
    # A nested scale below 2^-128 has an infinite inverse: its zeros then count as cell 0, as do all where it is 0.
    undefined = (runs == 0) & jnp.isinf(inverse)
    ratio = jnp.where(undefined, -1.0, jnp.clip(round_to_f32(runs * inverse), -1.0, 1.0))
    half = round_to_f32(ratio + 1.0) * 0.5
    cell = round_to_f32(half * (NESTED_CELLS - 1) + 0.5).astype(jnp.int32)
    codes = jnp.asarray(nested_code_table())[cell]
    return codes.reshape(-1)[: scales.size].reshape(scale_bits.shape), f64_to_f32(nested), f64_to_f32(offset)
