"""The Triton kernel of nf4_matvec in float32: levels are looked up, multiplied by x and summed over a block, in float32.

Sixteen bits take the kernel of `linears` (grouped_kernels.py), whose tensor cores float32 has no use for.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4.triton_kernels import block_scale


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
):
    """out[m, :] = x[m] W^T for one float32 row m = program_id(1), BN outputs; S blocks of 64 of each a step."""
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
        pair = pair.to(tl.int32)
        low, high = tl.load(levels + (pair & 15)) * x_low, tl.load(levels + (pair >> 4)) * x_high
        total += (low + high) * scale[:, :, None]
    y = tl.sum(tl.reshape(total, (BN, S * 32)), axis=1)
    tl.store(out + tl.program_id(1) * N + n, y.to(out.dtype.element_ty), mask=n < N)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"codes": "*u8", "scales": "*u8", "nested": "*fp32", "offset": "*fp32", "levels": "*fp32"}
    arrays |= {"nested_map": "*fp32", "layers": "*i32", "x": "*fp32", "out": "*fp32"}
    rest = {"N": 4096, "SCALE_COLUMNS": 64, "DOUBLE": True, "CELL_ROWS": 4, "CELL_COLUMNS": 64, "NESTED_COLUMNS": 1}
    yield matvec_kernel, arrays, rest | {"NESTED_SIZE": 1024, "S": 16, "BN": 4}, {"num_warps": 4}
