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
import triton
import triton.language as tl

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
    FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    NEW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
    CODED: tl.constexpr,
    PTX: tl.constexpr,
):
    """The attention of queries [GP, DP], each at its position, to those from `first` to `last`, and its log-sum-exp.

    k, v and scales begin at the row's first position.
    """
    columns = tl.arange(0, DP)
    dtype: tl.constexpr = tl.float16 if CODED and queries.dtype == tl.bfloat16 else queries.dtype
    LIFT: tl.constexpr = 14 if CODED else 0  # what weights are larger by, in powers of two
    factor = FACTOR
    if CODED:
        queries = queries.to(tl.float32)
        largest = tl.max(tl.abs(queries), axis=1)[:, None]
        queries /= tl.where(largest > 0, largest, 1.0)
        factor = largest * FACTOR
    queries = queries.to(dtype)
    highest = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    sums = tl.zeros((GP, DP), tl.float32)
    for start in range(first, last, BN):
        places = start + tl.arange(0, BN)
        held = places < last
        inside = held[:, None] & (columns < D)[None, :]
        where = places[:, None] * D + columns[None, :]
        keys = _numbers(tl.load(k + where, mask=inside, other=0.0), dtype, PTX)
        logits = tl.dot(queries, tl.trans(keys)) * factor
        if CODED:
            log2, inverse = _log2_and_inverse(tl.load(v_scales + places, mask=held, other=1.0), PTX)
            logits = logits * tl.load(k_scales + places, mask=held, other=0.0)[None, :] + log2[None, :]
        seen = held[None, :]
        if NEW > 1:  # a single new position sees all that is held
            seen &= places[None, :] <= position[:, None]
        if WINDOW > 0:
            seen &= places[None, :] > position[:, None] - WINDOW
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1) - LIFT)
        # a block of which a query sees nothing leaves it without a highest logit
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        before = tl.exp2(highest - shift)
        total = total * before + tl.sum(weights * inverse[None, :] if CODED else weights, axis=1)
        values = _numbers(tl.load(v + where, mask=inside, other=0.0), dtype, PTX)
        sums = sums * before[:, None] + tl.dot(weights.to(dtype), values)
        highest = higher
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    return sums, tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    k_scales,
    v_scales,
    lengths,
    layers,
    out,
    lse,
    FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    BATCH: tl.constexpr,
    NEW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PIECES: tl.constexpr,
    SPAN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
    CODED: tl.constexpr,
    PTX: tl.constexpr,
):
    """q [B, T, N, D], k and v [L, B, K, C, D] -> out [P, B, T, N, D] and lse [P, B, T, N] of P pieces of at least SPAN."""
    row, group, piece = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    size: tl.constexpr = HEADS // KV_HEADS
    line = tl.arange(0, GP)  # position line // size, head line % size of the group
    columns = tl.arange(0, DP)
    there = line < NEW * size
    real = there[:, None] & (columns < D)[None, :]
    at = (row * NEW + line // size) * HEADS + group * size + line % size
    queries = tl.load(q + at[:, None] * D + columns[None, :], mask=real, other=0.0)
    length = tl.load(lengths + row)
    position = length + line // size  # of each query; its own key is there
    end = tl.minimum(length + NEW, CAPACITY)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length + 1 - WINDOW, 0) // BN * BN
    blocks = (end - begin + PIECES * BN - 1) // (PIECES * BN)
    span = tl.maximum(blocks * BN, SPAN)
    first = begin + piece * span
    last = tl.minimum(first + span, end)
    base = (tl.load(layers).to(tl.int64) * BATCH + row) * KV_HEADS * CAPACITY + group * CAPACITY
    k += base * D
    v += base * D
    if CODED:
        k_scales += base
        v_scales += base
    sums, weight = attended(
        queries, k, v, k_scales, v_scales, first, last, position, FACTOR, WINDOW, NEW, D, DP, GP, BN, CODED, PTX
    )
    place = piece * BATCH * NEW * HEADS + at
    tl.store(out + place[:, None].to(tl.int64) * D + columns[None, :], sums.to(out.dtype.element_ty), mask=real)
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


STORED = {"bf16": (0.0, 80), "i8": (127.0, 80), "fp8e4nv": (448.0, 89)}  # the largest code, and the oldest GPU


def compile_cases():
    """What tests compile for every supported architecture. Few queries and 8 bits go by lane_kernels.py."""
    indices = {"lengths": "*i32", "layers": "*i32"}
    arrays = indices | {"out": "*fp32", "lse": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32"}
    sizes = {"BATCH": 8, "CAPACITY": 4096, "PIECES": 8, "SPAN": 128, "FACTOR": 0.125 * 1.4426950408889634, "PTX": True}
    shapes = (
        ("bf16", 128, 32, 8, 0, 1, "bf16"),
        ("fp16", 96, 9, 3, 1000, 5, "fp16"),
        ("fp16", 96, 9, 3, 0, 5, "fp8e4nv"),
    )
    for dtype, depth, heads, kv_heads, window, new, name in shapes:
        largest, oldest = STORED.get(name, STORED["bf16"])
        signature = arrays | {"q": f"*{dtype}"} | dict.fromkeys("kv", f"*{name}")
        shape = {"D": depth, "DP": 128, "HEADS": heads, "KV_HEADS": kv_heads, "GP": 16, "WINDOW": window}
        rest = shape | {"NEW": new, "CODED": largest > 0, "BN": 128 if largest else 64}
        yield decode_kernel, signature, sizes | rest, {"num_warps": 4, "num_stages": 2, "oldest": oldest}
    sizes = {"P": 66, "PP": 128, "LINES": 32, "D": 128, "DP": 128}
    yield merge_kernel, {"parts": "*fp32", "lse": "*fp32", "out": "*bf16"}, sizes, {"num_warps": 8}
