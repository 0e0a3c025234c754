"""Attention of a few new positions a row to its cache, the cache cut into pieces that programs share out.

A program owns a piece of one row's keys and values of one key head, and all G query heads of that head at all T new
positions: each key is read once. It leaves its part of the output, normalised by itself, and the log-sum-exp that weighs
the parts against each other. Pieces are equal parts of what the row holds, not of what the cache could hold; one that is
not needed leaves -inf there, and reads nothing.

Keys and values in 8 bits are multiplied as the codes that they are, in float16, which holds them exactly and which GPUs
convert them to by pairs. It has little range, so what they are multiplied with is made to fit:

    queries     divided by their largest number, which joins the logits
    weights     with value scale s_j, p_j s_j is 2^(logit_j + log2 s_j) and the highest of those is the softmax's; the sum
                of p_j takes s_j out again

Weights lie below 2^14 then, and above 2^-24, where float16 ends, all but some 2^-38 of the highest is kept.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from dataclasses import replace

import triton
import triton.language as tl

from pallas_kernels.decode_attention.work import Work

OLDEST = {"fp8e4nv": 89}  # GPU that has the dtype
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FLOATS: tl.constexpr = tl.constexpr("""{
    .reg .b16 a, b;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
}""")
# a byte b + 128 below the bits of 1024 is the float16 1152 + b
INTEGERS: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, less;
    mov.b32 less, 0xE480E480;
    xor.b32 a, $2, 0x80808080;
    prmt.b32 $0, a, 0x64646464, 0x4140;
    prmt.b32 $1, a, 0x64646464, 0x4342;
    add.f16x2 $0, $0, less;
    add.f16x2 $1, $1, less;
}""")


@triton.jit
def _numbers(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """What was loaded, as `dtype`.

    Codes become float16 in the threads that loaded them, and are then handed round for the product: in 16 bits there are
    instructions for that. Triton would hand round the bytes, one by one; not to be pure keeps the conversion in its place.
    """
    if PTX and codes.dtype.primitive_bitwidth == 8:
        CONVERT: tl.constexpr = INTEGERS if codes.dtype == tl.int8 else FLOATS
        numbers = tl.inline_asm_elementwise(CONVERT, "=r,=r,r", [codes], dtype=tl.float16, is_pure=False, pack=4)
    else:
        numbers = codes.to(dtype)
    return numbers


@triton.jit
def _log2_and_inverse(x, PTX: tl.constexpr):
    """Of positive numbers; what is less than 2^-64 counts as that, so that no weight is lost to the softmax's sum."""
    x = tl.maximum(x, 5.421010862427522e-20)
    if PTX:
        both: tl.constexpr = "lg2.approx.ftz.f32 $0, $2; rcp.approx.ftz.f32 $1, $2;"
        log2, inverse = tl.inline_asm_elementwise(
            both, "=f,=f,f", [x], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        log2, inverse = tl.log2(x), 1.0 / x
    return log2, inverse


@triton.jit
def attended(
    queries,
    k,
    v,
    k_scales,
    v_scales,
    first,
    last,
    position,
    W: tl.constexpr,
):
    """The attention of queries [tall, wide], each at its position, to those from `first` to `last`, and its log-sum-exp.

    k, v and scales begin at the row's first position.
    """
    TALL: tl.constexpr = W.tall
    WIDE: tl.constexpr = W.wide
    POSITIONS: tl.constexpr = W.positions
    columns = tl.arange(0, WIDE)
    dtype: tl.constexpr = tl.float16 if W.coded and queries.dtype == tl.bfloat16 else queries.dtype
    LIFT: tl.constexpr = 14 if W.coded else 0  # what weights are larger by, in powers of two
    factor = W.factor
    if W.coded:
        queries = queries.to(tl.float32)
        largest = tl.max(tl.abs(queries), axis=1)[:, None]
        queries /= tl.where(largest > 0, largest, 1.0)
        factor = largest * W.factor
    queries = queries.to(dtype)
    highest = tl.full((TALL,), float("-inf"), tl.float32)
    total = tl.zeros((TALL,), tl.float32)
    sums = tl.zeros((TALL, WIDE), tl.float32)
    for start in range(first, last, POSITIONS):
        places = start + tl.arange(0, POSITIONS)
        held = places < last
        inside = held[:, None] & (columns < W.depth)[None, :]
        where = places[:, None] * W.depth + columns[None, :]
        keys = _numbers(tl.load(k + where, mask=inside, other=0.0), dtype, W.ptx)
        logits = tl.dot(queries, tl.trans(keys)) * factor
        if W.coded:
            log2, inverse = _log2_and_inverse(tl.load(v_scales + places, mask=held, other=1.0), W.ptx)
            logits = logits * tl.load(k_scales + places, mask=held, other=0.0)[None, :] + log2[None, :]
        seen = held[None, :]
        if W.new > 1:  # a single new position sees all that is held
            seen &= places[None, :] <= position[:, None]
        if W.window > 0:
            seen &= places[None, :] > position[:, None] - W.window
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1) - LIFT)
        # a block of which a query sees nothing leaves it without a highest logit
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        before = tl.exp2(highest - shift)
        total = total * before + tl.sum(weights * inverse[None, :] if W.coded else weights, axis=1)
        values = _numbers(tl.load(v + where, mask=inside, other=0.0), dtype, W.ptx)
        sums = sums * before[:, None] + tl.dot(weights.to(dtype), values)
        highest = higher
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    return sums, tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2)


@triton.jit
def piece_of(length, piece, W: tl.constexpr):
    """Where a piece of a row that holds `length` positions begins and ends, and where the row does."""
    end = tl.minimum(length + W.new, W.capacity)
    begin = 0
    if W.window > 0:
        begin = tl.maximum(length + 1 - W.window, 0) // W.positions * W.positions
    blocks = (end - begin + W.pieces * W.positions - 1) // (W.pieces * W.positions)
    span = tl.maximum(blocks * W.positions, W.span)
    first = begin + piece * span
    return first, tl.minimum(first + span, end), end


@triton.jit
def place_of(layers, row, group, W: tl.constexpr):
    """The first position of a row's key head in the cache."""
    return (tl.load(layers).to(tl.int64) * W.batch + row) * W.kv_heads * W.capacity + group * W.capacity


@triton.jit
def decode_kernel(q, k, v, k_scales, v_scales, lengths, layers, out, lse, W: tl.constexpr):
    """q [B, T, N, D], k and v [L, B, K, C, D] -> out [P, B, T, N, D] and lse [P, B, T, N] of P pieces of at least a span."""
    row, group, piece = tl.program_id(0) // W.kv_heads, tl.program_id(0) % W.kv_heads, tl.program_id(1)
    line = tl.arange(0, W.tall)  # position line // group, head line % group of the group
    columns = tl.arange(0, W.wide)
    there = line < W.lines
    real = there[:, None] & (columns < W.depth)[None, :]
    at = (row * W.new + line // W.group) * W.heads + group * W.group + line % W.group
    queries = tl.load(q + at[:, None] * W.depth + columns[None, :], mask=real, other=0.0)
    length = tl.load(lengths + row)
    position = length + line // W.group  # of each query; its own key is there
    first, last, _ = piece_of(length, piece, W)
    base = place_of(layers, row, group, W)
    k += base * W.depth
    v += base * W.depth
    if W.coded:
        k_scales += base
        v_scales += base
    sums, weight = attended(queries, k, v, k_scales, v_scales, first, last, position, W)
    place = piece * W.batch * W.new * W.heads + at
    tl.store(out + place[:, None].to(tl.int64) * W.depth + columns[None, :], sums.to(out.dtype.element_ty), mask=real)
    tl.store(lse + place, weight, mask=there)


@triton.jit
def merge_kernel(
    parts, lse, out, P: tl.constexpr, PP: tl.constexpr, LINES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """out [LINES, D] = sum_p softmax_p(lse) parts_p of one line; parts [P, LINES, D], lse [P, LINES]."""
    line = tl.program_id(0)
    p = tl.arange(0, PP)
    column = tl.arange(0, DP)
    weight = tl.load(lse + p * LINES + line, mask=p < P, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, axis=0))
    place = (p * LINES + line).to(tl.int64)[:, None] * D + column[None, :]
    # a part with no weight was not written with anything to add up
    part = tl.load(parts + place, mask=(weight > 0)[:, None] & (column < D)[None, :], other=0.0)
    y = tl.sum(part * (weight / tl.sum(weight, axis=0))[:, None], axis=0)
    tl.store(out + line.to(tl.int64) * D + column, y.to(out.dtype.element_ty), mask=column < D)


CASE = Work(  # that others to compile differ from
    batch=8,
    new=1,
    heads=32,
    kv_heads=8,
    capacity=4096,
    depth=128,
    stored="bfloat16",
    factor=0.125 * LOG2E.value,
    window=0,
    positions=64,
    pieces=8,
    span=128,
)


def compile_cases():
    """What tests compile for every supported architecture. Few queries and 8 bits go by lane_kernels.py."""
    indices = {"lengths": "*i32", "layers": "*i32"}
    arrays = indices | {"out": "*fp32", "lse": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32"}
    odd = replace(CASE, new=5, heads=9, kv_heads=3, depth=96, stored="float16")
    cases = (
        ("bf16", "bf16", CASE),
        ("fp16", "fp16", replace(odd, window=1000)),
        ("fp16", "fp8e4nv", replace(odd, stored="float8_e4m3fn", positions=128)),
    )
    for dtype, name, case in cases:
        signature = arrays | {"q": f"*{dtype}"} | dict.fromkeys("kv", f"*{name}")
        options = {"num_warps": 4, "num_stages": 2, "oldest": OLDEST.get(name, 80)}
        yield decode_kernel, signature, {"W": case}, options
    sizes = {"P": 66, "PP": 128, "LINES": 32, "D": 128, "DP": 128}
    yield merge_kernel, {"parts": "*fp32", "lse": "*fp32", "out": "*bf16"}, sizes, {"num_warps": 8}
