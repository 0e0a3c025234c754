"""Attention of a few new positions a row to its cache, the cache cut into pieces that programs share out; and what puts
new positions into the cache.

A program owns a piece of one row's keys and values of one key head, and all G query heads of that head at all T new
positions: each key is read once. It leaves its part of the output, normalised by itself, and the log-sum-exp that weighs
the parts against each other. Pieces are equal parts of what the row holds, not of what the cache could hold; one that is
not needed leaves -inf there, and reads nothing.

Keys and values in 8 bits are multiplied as the codes that they are. A logit is then multiplied by its key's scale, and a
weight by its value's.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
    highest = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    sums = tl.zeros((GP, DP), tl.float32)
    for start in range(first, last, BN):
        places = start + tl.arange(0, BN)
        held = places < last
        inside = held[:, None] & (columns < D)[None, :]
        where = (base + places)[:, None] * D + columns[None, :]
        keys = tl.load(k + where, mask=inside, other=0.0).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(keys)) * FACTOR
        if CODED:
            logits *= tl.load(k_scales + base + places, mask=held, other=0.0)[None, :]
        seen = held[None, :] & (places[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= places[None, :] > position[:, None] - WINDOW
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        # a block of which a query sees nothing leaves it without a highest logit
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        before = tl.exp2(highest - shift)
        total = total * before + tl.sum(weights, axis=1)
        if CODED:
            weights *= tl.load(v_scales + base + places, mask=held, other=0.0)[None, :]
        values = tl.load(v + where, mask=inside, other=0.0).to(queries.dtype)
        sums = sums * before[:, None] + tl.dot(weights.to(queries.dtype), values)
        highest = higher
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    place = piece * BATCH * NEW * HEADS + at
    tl.store(out + place[:, None].to(tl.int64) * D + columns[None, :], sums, mask=real)
    weight = tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2)
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


@triton.jit
def _put(first, second, place, codes, scales, pair, inside, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """A vector of two halves at a place of the cache."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if LARGEST > 0:
        top = tl.max(tl.where(inside, tl.maximum(tl.abs(first), tl.abs(second)), 0.0), axis=0)
        scale = tl.where(top > 0, top / LARGEST, 1.0)
        tl.store(scales + place, scale)
        first, second = first / scale, second / scale
        if LARGEST == 127:
            first, second = tl.floor(first + 0.5), tl.floor(second + 0.5)
        first = tl.minimum(tl.maximum(first, -LARGEST), LARGEST)
        second = tl.minimum(tl.maximum(second, -LARGEST), LARGEST)
    dtype: tl.constexpr = codes.dtype.element_ty
    tl.store(codes + place * 2 * HALF + pair, first.to(dtype), mask=inside)
    tl.store(codes + place * 2 * HALF + HALF + pair, second.to(dtype), mask=inside)


@triton.jit
def append_kernel(
    qkv,
    cos,
    sin,
    lengths,
    layers,
    k_before,
    v_before,
    k_scales_before,
    v_scales_before,
    q,
    k,
    v,
    k_scales,
    v_scales,
    BATCH: tl.constexpr,
    NEW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One head of one token: q is turned, k turned and put into the cache, v put there. The cache is written in place."""
    token, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, WIDTH)
    inside = pair < HALF
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head).to(tl.int64) * 2 * HALF + pair
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    turned = head < HEADS + KV_HEADS
    c = tl.where(turned, tl.load(cos + token * HALF + pair, mask=inside, other=0.0), 1.0)
    s = tl.where(turned, tl.load(sin + token * HALF + pair, mask=inside, other=0.0), 0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    first, second = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
    if head < HEADS:
        target = q + (token * HEADS + head).to(tl.int64) * 2 * HALF + pair
        tl.store(target, first, mask=inside)
        tl.store(target + HALF, second, mask=inside)
    else:
        row, group = token // NEW, (head - HEADS) % KV_HEADS
        position = tl.load(lengths + row) + token % NEW
        if position < CAPACITY:
            line = (tl.load(layers).to(tl.int64) * BATCH + row) * KV_HEADS + group
            place = line * CAPACITY + position
            if turned:
                _put(first, second, place, k, k_scales, pair, inside, HALF, LARGEST)
            else:
                _put(first, second, place, v, v_scales, pair, inside, HALF, LARGEST)


STORED = {"bf16": (0.0, 80), "i8": (127.0, 80), "fp8e4nv": (448.0, 89)}  # the largest code, and the oldest GPU


def compile_cases():
    """What tests compile for every supported architecture."""
    indices = {"lengths": "*i32", "layers": "*i32"}
    arrays = indices | {"out": "*fp32", "lse": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32"}
    sizes = {"BATCH": 8, "CAPACITY": 4096, "PIECES": 8, "SPAN": 128, "BN": 64, "FACTOR": 0.125 * 1.4426950408889634}
    shapes = (("bf16", 128, 32, 8, 0, 1), ("fp16", 96, 9, 3, 1000, 5))
    for dtype, depth, heads, kv_heads, window, new in shapes:
        for name, (largest, oldest) in STORED.items():
            signature = arrays | {"q": f"*{dtype}"} | dict.fromkeys("kv", f"*{name if largest else dtype}")
            shape = {"D": depth, "DP": 128, "HEADS": heads, "KV_HEADS": kv_heads, "GP": 16, "WINDOW": window}
            rest = shape | {"NEW": new, "CODED": largest > 0}
            yield decode_kernel, signature, sizes | rest, {"num_warps": 4, "num_stages": 2, "oldest": oldest}
    sizes = {"P": 66, "PP": 128, "LINES": 32, "D": 128, "DP": 128}
    yield merge_kernel, {"parts": "*fp32", "lse": "*fp32", "out": "*bf16"}, sizes, {"num_warps": 8}
    sizes = {"BATCH": 8, "NEW": 2, "HEADS": 32, "KV_HEADS": 8, "CAPACITY": 4096, "HALF": 64, "WIDTH": 64}
    for name, (largest, oldest) in STORED.items():
        kept = dict.fromkeys(("k", "v", "k_before", "v_before"), f"*{name}")
        scales = dict.fromkeys(("k_scales", "v_scales", "k_scales_before", "v_scales_before"), "*fp32")
        signature = indices | kept | scales | {"qkv": "*bf16", "q": "*bf16", "cos": "*fp32", "sin": "*fp32"}
        yield append_kernel, signature, sizes | {"LARGEST": largest}, {"num_warps": 1, "oldest": oldest}
