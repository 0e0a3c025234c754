"""Triton kernels of thin products: one written beside its own operand, one over the rows of two, and two in one."""

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    x,
    a,
    scales,
    out,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """out[:, K:] = scales * (x[:, :K] a), zeros past the R columns of a. x and out are the same memory."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = row < ROWS
    line = row.to(tl.int64)[:, None] * STRIDE
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x + line + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(a + k[:, None] * R + column[None, :], mask=(k < K)[:, None] & (column < R)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else "tf32")
    z = total * tl.load(scales + column, mask=column < R, other=0.0)[None, :]
    place = out + line + K + column[None, :]
    tl.store(place, z.to(out.dtype.element_ty), mask=there[:, None] & (column < STRIDE - K)[None, :])


@triton.jit
def project_row_kernel(
    x,
    a,
    scales,
    out,
    K: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of one row, EACH columns a program, with a [R, K] transposed: few rows make too few tiles, and long ones."""
    row, column = tl.program_id(1), tl.program_id(0) * EACH + tl.arange(0, EACH)
    line = row.to(tl.int64) * STRIDE
    total = tl.zeros((EACH, BLOCK), tl.float32)
    if tl.program_id(0) * EACH < R:
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            left = tl.load(x + line + k, mask=k < K, other=0.0).to(tl.float32)
            there = (column < R)[:, None] & (k < K)[None, :]
            right = tl.load(a + column[:, None] * K + k[None, :], mask=there, other=0.0)
            total += left[None, :] * right.to(tl.float32)
    z = tl.sum(total, axis=1) * tl.load(scales + column, mask=column < R, other=0.0)
    tl.store(out + line + K + column, z.to(out.dtype.element_ty), mask=column < STRIDE - K)


@triton.jit
def contract_kernel(
    thin,
    wide,
    out,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    THIN_START: tl.constexpr,
    THIN_STRIDE: tl.constexpr,
    WIDE_STRIDE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    R_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """out[p] = thin^T wide over the p-th PART of the rows, in float32."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rank = tl.arange(0, R_PADDED)
    first = tl.program_id(1) * PART
    total = tl.zeros((R_PADDED, BLOCK_COLUMNS), tl.float32)
    for start in range(0, PART, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        there = (row < ROWS)[:, None]
        line = row.to(tl.int64)[:, None]
        left = tl.load(
            thin + line * THIN_STRIDE + THIN_START + rank[None, :], mask=there & (rank < R)[None, :], other=0.0
        )
        right = tl.load(wide + line * WIDE_STRIDE + column[None, :], mask=there & (column < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee" if EXACT else "tf32")
    place = out + tl.program_id(1).to(tl.int64) * R * N + rank[:, None] * N + column[None, :]
    tl.store(place, total, mask=(rank < R)[:, None] & (column < N)[None, :])


@triton.jit
def gradients_kernel(
    z,
    g,
    b,
    dz,
    db,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    STRIP: tl.constexpr,
    TILE: tl.constexpr,
    DOWN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """With g's columns from COLUMN on: dz[strip] = g b^T over a strip of columns, db[strip] = z^T g over one of rows."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    column = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    rank = tl.arange(0, RANK_PADDED)
    wide, thin = column < WIDTH, rank < RANK
    factor = tl.load(b + rank[None, :] * WIDTH + column[:, None], mask=thin[None, :] & wide[:, None], other=0.0)
    total = tl.zeros((RANK_PADDED, STRIP), tl.float32)
    first = tl.program_id(1) * DOWN
    for start in range(0, DOWN, TILE):
        row = first + start + tl.arange(0, TILE)
        there, line = row < ROWS, row.to(tl.int64)
        place = g + line[:, None] * STRIDE + COLUMN + column[None, :]
        tile = tl.load(place, mask=there[:, None] & wide[None, :], other=0.0)
        turned = tl.load(z + line[None, :] * RANK + rank[:, None], mask=there[None, :] & thin[:, None], other=0.0)
        total = tl.dot(turned, tile, total, input_precision=precision)
        part = tl.dot(tile, factor, input_precision=precision)
        place = dz + (tl.program_id(0).to(tl.int64) * ROWS + line[:, None]) * RANK + rank[None, :]
        tl.store(place, part, mask=there[:, None] & thin[None, :])
    place = db + (tl.program_id(1).to(tl.int64) * RANK + rank[:, None]) * WIDTH + column[None, :]
    tl.store(place, total, mask=thin[:, None] & wide[None, :])


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype, block_k in (("*bf16", 128), ("*fp16", 128), ("*fp32", 32)):
        sizes = {"ROWS": 100, "K": 4096, "R": 48, "STRIDE": 4160, "BLOCK_ROWS": 32, "BLOCK_K": block_k}
        arrays = {"x": dtype, "a": dtype, "scales": "*fp32", "out": dtype}
        constants = sizes | {"BLOCK_COLUMNS": 64, "EXACT": dtype == "*fp32"}
        yield project_kernel, arrays, constants, {"num_warps": 4, "num_stages": 4}
        if dtype == "*bf16":
            constants = {"K": 14336, "R": 16, "STRIDE": 14400, "EACH": 8, "BLOCK": 2048}
            yield project_row_kernel, arrays, constants, {"num_warps": 8, "num_stages": 2}
        sizes = {"ROWS": 100, "R": 48, "N": 6144, "THIN_START": 0, "THIN_STRIDE": 48, "WIDE_STRIDE": 6208, "PART": 64}
        arrays = {"thin": dtype, "wide": dtype, "out": "*fp32"}
        blocks = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128, "R_PADDED": 64, "EXACT": dtype == "*fp32"}
        yield contract_kernel, arrays, sizes | blocks, {"num_warps": 4, "num_stages": 4}
        sizes = {"ROWS": 4096, "COLUMN": 14336, "WIDTH": 14336, "STRIDE": 28736, "RANK": 16, "RANK_PADDED": 16}
        sizes |= {"STRIP": 128 if dtype == "*fp32" else 256, "TILE": 32 if dtype == "*fp32" else 64, "DOWN": 512}
        arrays = {"z": dtype, "g": dtype, "b": dtype, "dz": "*fp32", "db": "*fp32"}
        yield gradients_kernel, arrays, sizes | {"EXACT": dtype == "*fp32"}, {"num_warps": 4, "num_stages": 2}
