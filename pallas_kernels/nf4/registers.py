"""Codes in shared memory to weights in registers, as wgmma takes its left operand: the part of mosaic.py below Pallas.

A warp holds 16 rows of the operand, a thread of it two rows, eight apart, and two neighbouring columns of every eight.
Of a block's 32 bytes these are the pairs at 2 (lane mod 4) + 8 g: low nibbles make columns 8 g and on of the block's
first half, high nibbles the same ones of its second half.

Four codes in 16 bits are looked up together. A byte permutation takes the bits 0 to 2 of a code as they are, as the place
of a byte among eight; bit 3 chooses, in one more permutation, between the results for levels 0 to 7 and 8 to 15. That
gives four low bytes, and in the same way four high ones, which two permutations put together. 11 permutations and logic
operations for four weights, and four products; nothing comes from memory but the codes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS

LAYOUT = plgpu.Layout.WGMMA
PTX_TYPES = {"bfloat16": "bf16x2", "float16": "f16x2"}


@functools.cache
def rounded_levels(dtype: Any) -> tuple[float, tuple[float, ...]]:
    """(f, f times the levels in 16 bits), with the f of [1, 2) for which rounding them takes least away.

    In bfloat16 what rounding takes from normal weights is 0.08 % of their norm instead of 0.14 %.
    """
    factors = np.arange(1, 2, 2.0**-14)
    scaled = factors[:, None] * NF4_LEVELS.astype(np.float64)
    lost = (scaled.astype(dtype).astype(np.float64) - scaled) / factors[:, None]
    best = int(np.argmin(np.sum(lost**2, axis=1)))
    return float(factors[best]), tuple(float(level) for level in scaled[best].astype(dtype))


def split_scales(scales: jax.Array, dtype: Any) -> jax.Array:
    """uint32: a float32 scale as a sum of two 16-bit numbers, the larger in the low half."""
    high = scales.astype(dtype)
    low = (scales - high.astype(jnp.float32)).astype(dtype)
    high, low = (lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32) for part in (high, low))
    return high | (low << 16)


def decoded(codes: jax.Array, scales: jax.Array, levels: tuple[float, ...], dtype: Any) -> jax.Array:
    """What `look_up` and `scaled` make, of arrays."""
    parts = (scales & 0xFFFF), scales >> 16
    high, low = (lax.bitcast_convert_type(part.astype(jnp.uint16), dtype).astype(jnp.float32) for part in parts)
    rows = codes.shape[0]
    blocks = codes.reshape(rows, -1, BLOCK // 2)
    codes = jnp.concatenate([blocks & 15, blocks >> 4], axis=-1)
    level = sum(jnp.where(codes == code, np.float32(level), np.float32(0)) for code, level in enumerate(levels))
    return (level * (high + low).T[:, :, None]).astype(dtype).reshape(rows, -1)


@functools.cache
def table(levels: tuple[float, ...], dtype: Any) -> np.ndarray:
    """int32 [8]: low bytes of the levels, four a word, then their high bytes."""
    bits = np.asarray(levels, dtype).view(np.uint16)
    return np.concatenate([plane.astype(np.uint8).view(np.int32) for plane in (bits & 255, bits >> 8)])


def look_up(codes: Any, scales: Any, transforms: tuple, pitch: int, words: list[jax.Array], dtype: Any) -> tuple:
    """(levels, levels times the scales' lesser parts, the scales' greater parts [64, K/8]) of a part of W in shared memory.

    Args:
        codes: uint8 [64, K/2]. scales: uint32 [K/64, 64], `pitch` apart.
        words: `table` in registers; constants would be brought there again for every look-up.
    """
    rows, half = codes.shape
    matrix = plgpu.ShapeDtypeStruct((rows, 2 * half), dtype, layout=LAYOUT)
    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT(())] * len(words)),
        return_type=(matrix, matrix, plgpu.ShapeDtypeStruct((rows, half // 4), dtype, layout=LAYOUT)),
    )
    return inline(functools.partial(_look_up, pitch=pitch, dtype=jnp.dtype(dtype)))(codes, scales, *words)


def scaled(levels: jax.Array, lesser: jax.Array, greater: jax.Array) -> jax.Array:
    """The weights, levels * scales + lesser: what is left to do once the registers of wgmma's operand are free again."""
    inline = plgpu.inline_mgpu(
        arg_types=(LAYOUT,) * 3, return_type=plgpu.ShapeDtypeStruct(levels.shape, levels.dtype, layout=LAYOUT)
    )
    return inline(functools.partial(_scaled, dtype=levels.dtype))(levels, lesser, greater)


def _look_up(_: Any, codes: Any, scales: Any, *words: Any, pitch: int, dtype: Any) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i8, i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 16, 32))
    half = ir.MemRefType(codes.type).shape[-1]
    blocks = half // 32
    ptx = PTX_TYPES[dtype.name]

    def constant(value: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def permuted(a: Any, b: Any, selector: Any) -> Any:
        return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, result_types=i32)

    def loaded(pointer: Any, offset: Any, kind: Any) -> Any:
        return llvm.load(kind, utils.getelementptr(pointer, [offset], i8))

    words = [word.registers.item() for word in words]
    planes = words[:4], words[4:]
    thread = arith.remui(utils.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    first = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
    column = arith.muli(arith.remui(lane, constant(4)), constant(2))
    codes, scales = (utils.memref_ptr(ref) for ref in (codes, scales))

    def levels_of(pairs: Any) -> list[Any]:
        """[of low nibbles, of high nibbles], two 16-bit numbers each, of two bytes."""
        place = arith.andi(pairs, constant(0x7777))
        side = arith.ori(arith.andi(arith.shrui(pairs, constant(1)), constant(0x4444)), constant(0x3210))
        low, high = (permuted(permuted(p[0], p[1], place), permuted(p[2], p[3], place), side) for p in planes)
        return [permuted(low, high, constant(order)) for order in (0x6240, 0x7351)]

    levels, lesser, greater = (_registers(columns) for columns in (2 * half, 2 * half, half // 4))
    for upper in range(2):
        row = arith.addi(first, constant(8 * upper))
        offset = arith.muli(row, constant(half))
        # The swizzle flips bits 4 and up of an offset by as many bits from bit 7 on.
        swizzle = arith.muli(arith.andi(arith.divui(offset, constant(128)), constant(half // 16 - 1)), constant(16))
        pairs = {
            at: loaded(codes, arith.addi(offset, arith.xori(arith.addi(column, constant(at)), swizzle)), i16)
            for at in range(0, half, 8)
        }
        for block in range(blocks):
            both = loaded(scales, arith.muli(arith.addi(row, constant(block * pitch)), constant(4)), i32)
            coarse, fine = (permuted(both, both, constant(order)) for order in (0x1010, 0x3232))
            greater[0, block, 0, 0, upper] = coarse
            for group in range(4):
                both_halves = levels_of(arith.extui(i32, pairs[32 * block + 8 * group]))
                for side, level in enumerate(both_halves):
                    at = 0, 8 * block + 4 * side + group, 0, 0, upper
                    levels[at] = level
                    lesser[at] = utils.inline_ptx(f"mul.rn.{ptx} $0, $1, $2;", level, fine, result_types=i32)
    return tuple(_array(each, dtype) for each in (levels, lesser, greater))


def _scaled(_: Any, levels: Any, lesser: Any, greater: Any, *, dtype: Any) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    i32 = ir.IntegerType.get_signless(32)
    weights = _registers(levels.shape[1])
    for at in np.ndindex(*weights.shape[:5]):
        parts = levels.registers[at].item(), greater.registers[0, at[1] // 8, 0, 0, at[4]].item(), lesser.registers[at].item()
        parts = [utils.bitcast(part, i32) for part in parts]
        weights[at] = utils.inline_ptx(f"fma.rn.{PTX_TYPES[dtype.name]} $0, $1, $2, $3;", *parts, result_types=i32)
    return _array(weights, dtype)


def _registers(columns: int) -> np.ndarray:
    """For an operand [64, columns], a register of two columns each: of every eight columns, rows above and rows below."""
    return np.empty((1, columns // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)


def _array(registers: np.ndarray, dtype: Any) -> Any:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    pair = ir.VectorType.get((2,), utils.dtype_to_ir_type(dtype))
    filled = np.empty(registers.shape, dtype=object)
    for at, register in np.ndenumerate(registers):
        filled[at] = utils.bitcast(register, pair)
    return mgpu.FragmentedArray(_registers=filled, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
