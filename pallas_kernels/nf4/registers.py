"""Packed weights from shared memory to registers, as wgmma takes its left operand: the part of mosaic.py below Pallas.

A warp holds 16 rows of the operand, a thread of it two rows, eight apart, and two neighbouring columns of every eight.
Of a block's 32 bytes these are the pairs at 2 (lane mod 4) + 8 g: low nibbles make columns 8 g and on of the block's
first half, high nibbles the same ones of its second half, so that nothing moves between threads.

A level is looked up in shared memory, where sixteen float32 values lie in sixteen banks: a warp's look-ups, whichever they
are, take one access. Byte permutations of the levels' 16 bits, all in registers, took a fifth longer with 64 tokens and a
hundredth less with 4096 (bench/results/h200/trials.json), and their weights are not those of unpacking.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS


def decoded(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """What `decode` makes, of arrays."""
    rows = codes.shape[0]
    blocks = codes.reshape(rows, -1, BLOCK // 2)
    codes = jnp.concatenate([blocks & 15, blocks >> 4], axis=-1)
    levels = sum(jnp.where(codes == code, level, np.float32(0)) for code, level in enumerate(NF4_LEVELS))
    return (levels * scales.T[:, :, None]).reshape(rows, -1)


def decode(codes: Any, scales: Any, levels: Any, *, transforms: tuple, pitch: int) -> jax.Array:
    """The weights, float32 [64, K] in wgmma's layout, of what lies in shared memory.

    Args:
        codes: uint8 [64, K/2], with `transforms`. scales: float32 [K/64, 64], `pitch` apart. levels: float32 [16].
    """
    rows, half = codes.shape
    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((rows, 2 * half), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA),
    )
    return inline(functools.partial(_decode, half=half, pitch=pitch))(codes, scales, levels)


def _decode(_: Any, codes: Any, scales: Any, levels: Any, *, half: int, pitch: int) -> Any:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    i8, i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 16, 32))
    f32 = ir.F32Type.get()

    def constant(value: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def loaded(pointer: Any, offset: Any, kind: Any) -> Any:
        return llvm.load(kind, utils.getelementptr(pointer, [offset], i8))

    thread = arith.remui(utils.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    first = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
    column = arith.muli(arith.remui(lane, constant(4)), constant(2))
    codes, scales, levels = (utils.memref_ptr(ref) for ref in (codes, scales, levels))

    def weight(bytes_: Any, nibble: int, scale: Any) -> Any:
        # four times the code, as an offset into the levels
        shifted = arith.shrui(bytes_, constant(4 * nibble - 2)) if nibble else arith.shli(bytes_, constant(2))
        return arith.mulf(loaded(levels, arith.andi(shifted, constant(15 << 2)), f32), scale)

    pair = ir.VectorType.get((2,), f32)
    registers = np.empty((1, half // 4, 1, 1, 2, 1, 1, 1, 1), dtype=object)
    for lower in range(2):
        row = arith.addi(first, constant(8 * lower))
        offset = arith.muli(row, constant(half))
        # The swizzle flips bits 4 and up of an offset by as many bits from bit 7 on.
        swizzle = arith.muli(arith.andi(arith.divui(offset, constant(128)), constant(half // 16 - 1)), constant(16))
        places = [arith.addi(offset, arith.xori(arith.addi(column, constant(at)), swizzle)) for at in range(0, half, 8)]
        bytes_ = [arith.extui(i32, loaded(codes, place, i16)) for place in places]
        for block in range(half // 32):
            scale = loaded(scales, arith.muli(arith.addi(row, constant(block * pitch)), constant(4)), f32)
            for group in range(4):
                for side in range(2):
                    parts = [weight(bytes_[4 * block + group], nibble, scale) for nibble in (side, side + 2)]
                    registers[0, 8 * block + 4 * side + group, 0, 0, lower] = vector.from_elements(pair, parts)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
