"""Triton kernels of nf4_matmul: products with packed weights that are decoded in registers, for tokens by the dozen.

Both passes make their result transposed, so that decoded weights are a product's left operand and tokens, of which
there may be few, its columns. A block's 32 bytes hold its values 0..31 in low nibbles and 32..63 in high ones: each
block is two products, one of either half. Codes are those of one matrix of a stack; scales are that matrix's, in float32,
undone of their own quantisation.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import DECODE_BF16, DECODE_F16


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
def _weights(pair, scale, levels, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels times scales, rounded to `dtype`: of low and of high nibbles."""
    low, high = _decoded(pair, levels, dtype, PTX)
    if dtype == tl.bfloat16:  # two products an instruction; float16 has not the range for scales
        low, high = low * scale.to(dtype), high * scale.to(dtype)
    else:
        low, high = (low.to(tl.float32) * scale).to(dtype), (high.to(tl.float32) * scale).to(dtype)
    return low, high


@triton.jit
def _finished(total, PTX: tl.constexpr):
    """The same sums, once the products behind them are done: at the end of each step of a loop.

    Hopper's tensor cores read a left operand's registers while the program goes on. The next step's decoding may be given the
    same ones before anything waits, and then has been seen to overwrite them. Asking for the sums is such a wait.
    """
    if PTX:
        total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def product_kernel(
    x,
    codes,
    scales,
    levels,
    layers,
    beside,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[split] = x [W beside]^T over one part of a row's BLOCKS, S a step; x [M, in+ROOM], beside [N, ROOM].

    The last part takes `beside`.
    """
    dtype = x.dtype.element_ty
    codes += tl.load(layers).to(tl.int64) * (N * BLOCKS * 32)
    PROGRAMS: tl.constexpr = (M + BM - 1) // BM  # that share a strip of the weight, next to each other
    m = tl.program_id(0) % PROGRAMS * BM + tl.arange(0, BM)
    n = tl.program_id(0) // PROGRAMS * BN + tl.arange(0, BN)
    tokens, rows = (m < M)[None, :], n < N
    j = tl.arange(0, 32)
    line = x + m.to(tl.int64)[None, :] * (BLOCKS * 64 + ROOM)
    PART: tl.constexpr = ((BLOCKS + S - 1) // S + SPLITS - 1) // SPLITS
    first = tl.program_id(1) * PART
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, first + PART, num_stages=STAGES):
        for s in tl.static_range(S):
            block = step * S + s
            if BLOCKS % S == 0 and (BLOCKS // S) % SPLITS == 0:
                here, there = rows, tokens
            else:
                here, there = rows & (n * 0 + block < BLOCKS), tokens & (m * 0 + block < BLOCKS)[None, :]
            pair = tl.load(codes + (n[:, None] * BLOCKS + block) * 32 + j[None, :], mask=here[:, None], other=0)
            scale = tl.load(scales + n * BLOCKS + block, mask=here, other=0.0)
            x_low = tl.load(line + block * 64 + j[:, None], mask=there, other=0.0)
            x_high = tl.load(line + block * 64 + 32 + j[:, None], mask=there, other=0.0)
            low, high = _weights(pair, scale[:, None], levels, dtype, PTX)
            total = tl.dot(low, x_low, total)
            total = tl.dot(high, x_high, total)
        total = _finished(total, PTX)
    if ROOM > 0:  # noqa: SIM102 (a constant, and a number that is none)
        if tl.program_id(1) == SPLITS - 1:
            for start in range(0, ROOM, 64):
                r = start + tl.arange(0, 64)
                left = tl.load(beside + n[:, None] * ROOM + r[None, :], mask=rows[:, None], other=0.0)
                right = tl.load(line + BLOCKS * 64 + r[:, None], mask=tokens, other=0.0)
                total = tl.dot(left, right, total)
    place = out + (tl.program_id(1).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=tokens & rows[:, None])


@triton.jit
def input_gradient_kernel(
    g,
    codes,
    scales,
    levels,
    layers,
    beside,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[split] = g [W; beside] over one part of W's rows, BN a step; g [M, N+ROOM], beside [ROOM, in].

    A program owns S blocks of W's columns. The last part takes `beside`.
    """
    dtype = g.dtype.element_ty
    codes += tl.load(layers).to(tl.int64) * (N * BLOCKS * 32)
    WIDTH: tl.constexpr = BLOCKS * 64
    PROGRAMS: tl.constexpr = (M + BM - 1) // BM
    m = tl.program_id(0) % PROGRAMS * BM + tl.arange(0, BM)
    tokens = (m < M)[None, :]
    line = g + m.to(tl.int64)[None, :] * (N + ROOM)
    block = tl.program_id(0) // PROGRAMS * S + tl.arange(0, S)
    j = tl.arange(0, 32)
    PART: tl.constexpr = ((N + BN - 1) // BN + SPLITS - 1) // SPLITS
    first = tl.program_id(1) * PART
    low_total = tl.zeros((S * 32, BM), tl.float32)
    high_total = tl.zeros((S * 32, BM), tl.float32)
    for step in tl.range(first, first + PART, num_stages=STAGES):
        n = step * BN + tl.arange(0, BN)
        place = n[:, None] * BLOCKS + block[None, :]
        here = (n < N)[:, None] & (block < BLOCKS)[None, :]
        pair = tl.load(codes + place[:, :, None] * 32 + j[None, None, :], mask=here[:, :, None], other=0)
        scale = tl.load(scales + place, mask=here, other=0.0)
        right = tl.load(line + n[:, None], mask=(n < N)[:, None] & tokens, other=0.0)
        low, high = _weights(pair, scale[:, :, None], levels, dtype, PTX)
        low_total = tl.dot(tl.trans(tl.reshape(low, (BN, S * 32))), right, low_total)
        high_total = tl.dot(tl.trans(tl.reshape(high, (BN, S * 32))), right, high_total)
        low_total, high_total = _finished(low_total, PTX), _finished(high_total, PTX)
    k = tl.reshape(block[:, None] * 64 + j[None, :], (S * 32,))
    columns = (k < WIDTH)[:, None]
    if ROOM > 0:  # noqa: SIM102 (a constant, and a number that is none)
        if tl.program_id(1) == SPLITS - 1:
            for start in range(0, ROOM, 64):
                r = start + tl.arange(0, 64)
                right = tl.load(line + N + r[:, None], mask=tokens, other=0.0)
                left = beside + r[None, :] * WIDTH + k[:, None]
                low_total = tl.dot(tl.load(left, mask=columns, other=0.0), right, low_total)
                high_total = tl.dot(tl.load(left + 32, mask=columns, other=0.0), right, high_total)
    place = out + (tl.program_id(1).to(tl.int64) * M + m[None, :]) * WIDTH + k[:, None]
    tl.store(place, low_total.to(out.dtype.element_ty), mask=tokens & columns)
    tl.store(place + 32, high_total.to(out.dtype.element_ty), mask=tokens & columns)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"codes": "*u8", "scales": "*fp32", "levels": "*fp32", "layers": "*i32"}
    sizes = {"M": 100, "N": 4096, "BLOCKS": 64, "S": 2, "BM": 64, "STAGES": 3, "PTX": True}
    signature = arrays | dict.fromkeys(("x", "beside"), "*bf16") | {"out": "*fp32"}
    yield product_kernel, signature, sizes | {"BN": 128, "ROOM": 64, "SPLITS": 2, "S": 1, "BM": 128}, {"num_warps": 8}
    signature = arrays | dict.fromkeys(("g", "beside", "out"), "*fp16")
    yield input_gradient_kernel, signature, sizes | {"BN": 64, "ROOM": 0, "SPLITS": 1}, {"num_warps": 4}
