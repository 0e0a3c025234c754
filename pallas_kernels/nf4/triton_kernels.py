"""Triton kernels of NF4. Blocks of 64 values are numbered along the rows; codes, scales and values all lie in that order."""

import triton
import triton.language as tl


@triton.jit
def block_scale(
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
def _rounded(value, dtype: tl.constexpr, FLUSH: tl.constexpr, PTX: tl.constexpr):
    if FLUSH:
        if PTX:  # an operation on float32 that reads denormals as zeros of their sign
            value = tl.inline_asm_elementwise(
                "mul.ftz.f32 $0, $1, 0f3F800000;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
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
    PTX: tl.constexpr,
):
    """GROUP blocks of matrix layers[j] of a stack, j = program_id(1), to the rows of out[j * STRIDE ...] from FIRST_ROW on.

    `previous` is `out` before this launch, where another one has written the other part of it, and else anything.
    """
    layer = tl.load(layers + tl.program_id(1)).to(tl.int64)
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = block < BLOCKS
    within = tl.arange(0, 32)[None, :]
    mask = inside[:, None] & (within < 32)
    # before the scales, whose loads wait for each other
    pair = tl.load(codes + layer * BLOCKS * 32 + block.to(tl.int64)[:, None] * 32 + within, mask=mask, other=0)
    scale = block_scale(
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
    row = FIRST_ROW + block // SCALE_COLUMNS
    start = tl.program_id(1).to(tl.int64) * STRIDE + row.to(tl.int64) * ROW_STRIDE + block % SCALE_COLUMNS * 64
    place = out + start[:, None] + within
    dtype = out.dtype.element_ty
    pair = pair.to(tl.int32)
    tl.store(place, _rounded(tl.load(levels + (pair & 15)) * scale, dtype, FLUSH, PTX), mask=mask)
    tl.store(place + 32, _rounded(tl.load(levels + (pair >> 4)) * scale, dtype, FLUSH, PTX), mask=mask)


@triton.jit
def _code(x, bounds, below):
    """How many of the 15 boundaries lie strictly below x in [-1, 1]: those of lower cells, and its own cell's, if any.

    A cell is 1/16 wide, less than boundaries are apart.
    """
    cell = (x * 16.0 + 16.0).to(tl.int32) & 63
    return tl.load(below + cell) + (x > tl.load(bounds + cell)).to(tl.int32)


@triton.jit
def quantize_kernel(x, bounds, below, codes, scales, BLOCKS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Codes and float32 scales of GROUPS times GROUP blocks. Every operation rounds to float32, denormals kept."""
    within = tl.arange(0, 32)[None, :]
    for i in tl.static_range(GROUPS):
        block = (tl.program_id(0).to(tl.int64) * GROUPS + i) * GROUP + tl.arange(0, GROUP)
        inside = block < BLOCKS
        mask = inside[:, None] & (within < 32)
        place = x + block[:, None] * 64 + within
        low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(place + 32, mask=mask, other=0.0).to(tl.float32)
        scale = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)
        one = tl.full((GROUP,), 1.0, tl.float32)
        # typed: Triton 3.6 takes a literal outside float32's normal range for a float64
        least = tl.full((GROUP,), 1e-38, tl.float32)
        inverse = tl.div_rn(one, tl.maximum(scale, least))[:, None]
        pair = _code(low * inverse, bounds, below) | (_code(high * inverse, bounds, below) << 4)
        tl.store(codes + block[:, None] * 32 + within, pair.to(tl.uint8), mask=mask)
        tl.store(scales + block, scale, mask=inside)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"codes": "*u8", "nested": "*fp32", "offset": "*fp32", "levels": "*fp32", "nested_map": "*fp32"}
    arrays |= {"layers": "*i32", "previous": "*fp32"}
    grid = {"SCALE_COLUMNS": 64, "CELL_ROWS": 4, "CELL_COLUMNS": 64, "NESTED_COLUMNS": 1, "NESTED_SIZE": 256}
    rest = {"BLOCKS": 65536, "FIRST_ROW": 0, "ROW_STRIDE": 4096, "STRIDE": 0, "GROUP": 128, "PTX": True}
    for dtype, flush, double in (("bf16", True, True), ("fp16", False, True), ("fp32", False, False)):
        signature = arrays | {"scales": "*u8" if double else "*fp32", "out": f"*{dtype}"}
        yield dequantize_kernel, signature, grid | rest | {"DOUBLE": double, "FLUSH": flush}, {"num_warps": 4}
    arrays = {"bounds": "*fp32", "below": "*i32", "codes": "*u8", "scales": "*fp32"}
    for dtype in ("bf16", "fp32"):
        yield (
            quantize_kernel,
            arrays | {"x": f"*{dtype}"},
            {"BLOCKS": 65536, "GROUP": 32, "GROUPS": 1},
            {"num_warps": 4},
        )
