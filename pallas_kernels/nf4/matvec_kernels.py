"""Triton kernels of nf4_matvec. A program makes BN outputs of one or of up to 16 rows of x, reading its codes once.

Each step takes S blocks of 64 of a weight row: their codes become levels, the products of levels and x are summed over a
block, and the block's scale multiplies the sum.

Decoding in registers: PTX's prmt picks four bytes of eight by four 4-bit selectors, and half a word of codes is just
that. The low three bits of a code select among levels 0..7 and among 8..15, from a table of the levels' high bytes and
one of their low bytes; the top bit chooses between the two. It takes 23 instructions for the eight codes of a word.
"""

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.nf4.codebook import NF4_LEVELS
from pallas_kernels.nf4.triton_kernels import block_scale


def _decoder(dtype: type) -> str:
    """PTX: a word of codes $4 -> levels of its low nibbles $0 $1 and of its high nibbles $2 $3."""
    levels = NF4_LEVELS.astype(dtype).view(np.uint16)
    high, low = ([f"0x{word:08X}" for word in part.astype(np.uint8).view(np.uint32)] for part in (levels >> 8, levels))

    def half(even: str, odd: str) -> str:
        return f"""
        prmt.b32 upper, 0x0000FF00, 0, top;
        prmt.b32 a, {high[0]}, {high[1]}, code;
        prmt.b32 b, {high[2]}, {high[3]}, code;
        lop3.b32 h, upper, b, a, 0xCA;
        prmt.b32 a, {low[0]}, {low[1]}, code;
        prmt.b32 b, {low[2]}, {low[3]}, code;
        lop3.b32 l, upper, b, a, 0xCA;
        prmt.b32 {even}, l, h, 0x6240;
        prmt.b32 {odd}, l, h, 0x7351;"""

    return f"""{{
        .reg .b32 code, top, upper, a, b, h, l;
        and.b32 code, $4, 0x77777777;
        shr.b32 top, $4, 3;
        and.b32 top, top, 0x11111111;{half("$0", "$2")}
        shr.b32 code, code, 16;
        shr.b32 top, top, 16;{half("$1", "$3")}
    }}"""


DECODE_BF16 = tl.constexpr(_decoder(ml_dtypes.bfloat16))
DECODE_F16 = tl.constexpr(_decoder(np.float16))


@triton.jit
def _decoded(pair, levels, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels of low and of high nibbles, rounded to `dtype`."""
    if PTX and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            DECODE_BF16, "=r,=r,=r,=r,r", [pair], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif PTX and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            DECODE_F16, "=r,=r,=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        wide = pair.to(tl.int32)
        low = tl.load(levels + (wide & 15)).to(dtype)
        high = tl.load(levels + (wide >> 4)).to(dtype)
    return low, high


@triton.jit
def matvec_kernel(
    x,
    codes,
    scales,
    nested,
    offset,
    levels,
    nested_map,
    layers,
    out,
    N: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    NESTED_COLUMNS: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[m, :] = x[m] W^T for one row m = program_id(1), in float32 multiply-adds."""
    layer = tl.load(layers).to(tl.int64)
    codes += layer * N * SCALE_COLUMNS * 32
    scales += layer * N * SCALE_COLUMNS
    nested += layer * NESTED_SIZE
    offset += layer
    x += tl.program_id(1) * SCALE_COLUMNS * 64
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, 32)[None, None, :]
    total = tl.zeros((BN, S, 32), tl.float32)
    for first in range(0, SCALE_COLUMNS, S):
        column = first + tl.arange(0, S)
        inside = (column[None, :] < SCALE_COLUMNS) & (n[:, None] < N)
        block = n[:, None] * SCALE_COLUMNS + column[None, :]
        pair = tl.load(codes + block.to(tl.int64)[:, :, None] * 32 + j, mask=inside[:, :, None], other=0)
        at, mask = x + column[None, :, None] * 64 + j, column[None, :, None] < SCALE_COLUMNS
        x_low, x_high = tl.load(at, mask=mask, other=0.0), tl.load(at + 32, mask=mask, other=0.0)
        scale = block_scale(
            block,
            inside,
            scales,
            nested,
            offset,
            nested_map,
            DOUBLE,
            SCALE_COLUMNS,
            CELL_ROWS,
            CELL_COLUMNS,
            NESTED_COLUMNS,
        )
        low, high = _decoded(pair, levels, x.dtype.element_ty, PTX)
        low, high = low.to(tl.float32) * x_low.to(tl.float32), high.to(tl.float32) * x_high.to(tl.float32)
        total += (low + high) * scale[:, :, None]
    y = tl.sum(tl.reshape(total, (BN, S * 32)), axis=1)
    tl.store(out + tl.program_id(1) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def matvec_dot_kernel(
    x,
    codes,
    scales,
    nested,
    offset,
    levels,
    nested_map,
    layers,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    NESTED_COLUMNS: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """out = x W^T for up to 16 rows on tensor cores; warps share out the S blocks of a step."""
    layer = tl.load(layers).to(tl.int64)
    codes += layer * N * SCALE_COLUMNS * 32
    scales += layer * N * SCALE_COLUMNS
    nested += layer * NESTED_SIZE
    offset += layer
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, 16)
    j = tl.arange(0, 32)[None, None, :]
    total = tl.zeros((S, 16, BN), tl.float32)
    for step in tl.range(0, (SCALE_COLUMNS + S - 1) // S, num_stages=STAGES):
        column = step * S + tl.arange(0, S)
        inside = (column[:, None] < SCALE_COLUMNS) & (n[None, :] < N)
        block = n[None, :] * SCALE_COLUMNS + column[:, None]
        pair = tl.load(codes + block.to(tl.int64)[:, :, None] * 32 + j, mask=inside[:, :, None], other=0)
        at = x + m[None, :, None] * (SCALE_COLUMNS * 64) + column[:, None, None] * 64 + j
        mask = (m[None, :, None] < M) & (column[:, None, None] < SCALE_COLUMNS)
        x_low, x_high = tl.load(at, mask=mask, other=0.0), tl.load(at + 32, mask=mask, other=0.0)
        low, high = _decoded(pair, levels, x.dtype.element_ty, PTX)
        product = tl.dot(x_low, tl.permute(low, (0, 2, 1)))
        product = tl.dot(x_high, tl.permute(high, (0, 2, 1)), product)
        scale = block_scale(
            block,
            inside,
            scales,
            nested,
            offset,
            nested_map,
            DOUBLE,
            SCALE_COLUMNS,
            CELL_ROWS,
            CELL_COLUMNS,
            NESTED_COLUMNS,
        )
        total += product * scale[:, None, :]
    y = tl.sum(total, axis=0)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=mask)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"codes": "*u8", "scales": "*u8", "nested": "*fp32", "offset": "*fp32", "levels": "*fp32"}
    arrays |= {"nested_map": "*fp32", "layers": "*i32"}
    rest = {"N": 4096, "SCALE_COLUMNS": 64, "DOUBLE": True, "CELL_ROWS": 4, "CELL_COLUMNS": 64, "NESTED_COLUMNS": 1}
    rest |= {"NESTED_SIZE": 1024, "PTX": True}
    for dtype in ("bf16", "fp16", "fp32"):
        both = arrays | {"x": f"*{dtype}", "out": f"*{dtype}"}
        yield matvec_kernel, both, rest | {"S": 16, "BN": 4}, {"num_warps": 4}
        if dtype != "fp32":
            yield matvec_dot_kernel, both, rest | {"M": 3, "S": 4, "BN": 16, "STAGES": 3}, {"num_warps": 4}
