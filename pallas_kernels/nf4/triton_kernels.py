"""Triton kernels of NF4. Blocks of 64 values are numbered along the rows; codes, scales and values all lie in that order."""

import triton
import triton.language as tl


@triton.jit
def _block_scale(
    block,
    inside,
    scales,
    nested,
    offset,
    nested_map,
    DOUBLE: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    NESTED_COLUMNS: tl.constexpr,
):
    """float32 scales of the blocks; every operation rounds by itself."""
    if not DOUBLE:
        return tl.load(scales + block, mask=inside, other=0.0)
    entry = tl.load(nested_map + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    cell = block // SCALE_COLUMNS // CELL_ROWS * NESTED_COLUMNS
    if NESTED_COLUMNS > 1:
        cell += block % SCALE_COLUMNS // CELL_COLUMNS
    unit = tl.load(nested + cell, mask=inside, other=0.0)
    product = (entry * unit).to(tl.int32, bitcast=True)
    # OR-ed with a zero that the compiler cannot know for one (1 for a NaN, which it leaves a NaN): the product and the
    # sum after it stay two operations
    product |= ((unit.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000).to(tl.int32)
    return product.to(tl.float32, bitcast=True) + tl.load(offset)


@triton.jit
def _rounded(value, dtype: tl.constexpr, FLUSH: tl.constexpr):
    if FLUSH:
        bits = value.to(tl.int32, bitcast=True)
        zero = (bits & -2147483648).to(tl.float32, bitcast=True)
        value = tl.where((bits & 0x7F800000) == 0, zero, value)
    return value.to(dtype)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    nested,
    offset,
    levels,
    nested_map,
    layers,
    previous,
    out,
    BLOCKS: tl.constexpr,
    DOUBLE: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    NESTED_COLUMNS: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    FLUSH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """GROUP blocks of matrix layers[j] of a stack, j = program_id(1), to the rows of out[j * STRIDE ...] from FIRST_ROW on.

    `previous` is `out` before this launch, where another one has written the other part of it, and else anything.
    """
    layer = tl.load(layers + tl.program_id(1)).to(tl.int64)
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = block < BLOCKS
    scale = _block_scale(
        block,
        inside,
        scales + layer * BLOCKS,
        nested + layer * NESTED_SIZE,
        offset + layer,
        nested_map,
        DOUBLE,
        SCALE_COLUMNS,
        CELL_ROWS,
        CELL_COLUMNS,
        NESTED_COLUMNS,
    )[:, None]
    within = tl.arange(0, 32)[None, :]
    mask = inside[:, None] & (within < 32)
    pair = tl.load(codes + layer * BLOCKS * 32 + block[:, None] * 32 + within, mask=mask, other=0).to(tl.int32)
    row = FIRST_ROW + block // SCALE_COLUMNS
    start = tl.program_id(1).to(tl.int64) * STRIDE + row * ROW_STRIDE + block % SCALE_COLUMNS * 64
    place = out + start[:, None] + within
    dtype = out.dtype.element_ty
    tl.store(place, _rounded(tl.load(levels + (pair & 15)) * scale, dtype, FLUSH), mask=mask)
    tl.store(place + 32, _rounded(tl.load(levels + (pair >> 4)) * scale, dtype, FLUSH), mask=mask)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"codes": "*u8", "nested": "*fp32", "offset": "*fp32", "levels": "*fp32", "nested_map": "*fp32"}
    arrays |= {"layers": "*i32", "previous": "*fp32"}
    grid = {"SCALE_COLUMNS": 64, "CELL_ROWS": 4, "CELL_COLUMNS": 64, "NESTED_COLUMNS": 1, "NESTED_SIZE": 256}
    rest = {"BLOCKS": 65536, "FIRST_ROW": 0, "ROW_STRIDE": 4096, "STRIDE": 0, "GROUP": 64}
    for dtype, flush in (("bf16", True), ("fp16", False), ("fp32", False)):
        for double in (True, False):
            signature = arrays | {"scales": "*u8" if double else "*fp32", "out": f"*{dtype}"}
            yield dequantize_kernel, signature, grid | rest | {"DOUBLE": double, "FLUSH": flush}, {"num_warps": 4}
