"""Attention of one new position a row to its cache, the cache cut into pieces that programs share out.

A program owns a piece of one row's keys and values of one key head, and all G query heads of that head: each key is read
once. It leaves its part of the output, normalised by itself, and the log-sum-exp that weighs the parts against each other;
a piece past the row's end leaves -inf there, and reads nothing.
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
    lengths,
    out,
    lse,
    FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPAN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
):
    """q [B, N, D], k and v [B, K, C, D] -> out [P, B, N, D] and lse [P, B, N] of P pieces of SPAN positions."""
    row, group, piece = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    size: tl.constexpr = HEADS // KV_HEADS
    heads = tl.arange(0, GP)
    columns = tl.arange(0, DP)
    real = (heads < size)[:, None] & (columns < D)[None, :]
    at = row * HEADS + group * size + heads
    queries = tl.load(q + at[:, None] * D + columns[None, :], mask=real, other=0.0)
    position = tl.load(lengths + row)  # of the query; its own key is there
    first = piece * SPAN
    last = tl.minimum(first + SPAN, position + 1)
    if WINDOW > 0:
        first = tl.maximum(first, (position + 1 - WINDOW) // BN * BN)
    base = (row * KV_HEADS + group).to(tl.int64) * CAPACITY * D
    highest = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    sums = tl.zeros((GP, DP), tl.float32)
    for start in range(first, last, BN):
        places = start + tl.arange(0, BN)
        inside = (places < last)[:, None] & (columns < D)[None, :]
        where = base + places[:, None].to(tl.int64) * D + columns[None, :]
        keys = tl.load(k + where, mask=inside, other=0.0)
        logits = tl.dot(queries, tl.trans(keys)) * FACTOR
        seen = places < last
        if WINDOW > 0:
            seen &= places > position - WINDOW
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        # a block in which a window leaves nothing has no highest logit yet
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        before = tl.exp2(highest - shift)
        total = total * before + tl.sum(weights, axis=1)
        values = tl.load(v + where, mask=inside, other=0.0)
        sums = sums * before[:, None] + tl.dot(weights.to(values.dtype), values)
        highest = higher
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    place = piece * BATCH * HEADS + at
    tl.store(out + place[:, None].to(tl.int64) * D + columns[None, :], sums, mask=real)
    weight = tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + place, weight, mask=heads < size)


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"lengths": "*i32", "out": "*fp32", "lse": "*fp32"}
    sizes = {"BATCH": 8, "CAPACITY": 4096, "SPAN": 512, "BN": 64, "FACTOR": 0.125 * 1.4426950408889634}
    for dtype, depth, heads, kv_heads, window in (("bf16", 128, 32, 8, 0), ("fp16", 96, 9, 3, 1000)):
        signature = arrays | dict.fromkeys("qkv", f"*{dtype}")
        shape = {"D": depth, "DP": 128, "HEADS": heads, "KV_HEADS": kv_heads, "GP": 16, "WINDOW": window}
        yield decode_kernel, signature, sizes | shape, {"num_warps": 4, "num_stages": 2}
