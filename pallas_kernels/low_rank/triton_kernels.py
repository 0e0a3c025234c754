"""Triton kernel of a thin product written beside its own operand."""

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


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype, block_k in (("*bf16", 128), ("*fp16", 128), ("*fp32", 32)):
        sizes = {"ROWS": 100, "K": 4096, "R": 48, "STRIDE": 4160, "BLOCK_ROWS": 32, "BLOCK_K": block_k}
        arrays = {"x": dtype, "a": dtype, "scales": "*fp32", "out": dtype}
        constants = sizes | {"BLOCK_COLUMNS": 64, "EXACT": dtype == "*fp32"}
        yield project_kernel, arrays, constants, {"num_warps": 4, "num_stages": 4}
