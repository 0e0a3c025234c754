"""Attention as Triton kernels: forward, gradient of keys and values, gradient of queries.

The math is that of `op.py`. A program of the forward and of the queries' gradient owns a block of queries of one head and
walks over blocks of keys; a program of the keys' gradient owns a block of keys of one key/value head and walks over the
blocks of each of the head's query heads, so that grouped heads are summed in registers. Nothing is added atomically:
results do not depend on the order of programs. That costs seven matrix products in the backward pass instead of five.

Which blocks a walk visits follows from causal order, window and segments (`segments.py`), and is cut in three: blocks
where a pair may be invisible at both ends, blocks that need no mask between them (`_walk`). Logits are kept as x with
log2(e) t = x factor: one multiply-add before exp2 for both the scale and the change of base; with a cap, x is the tanh.
A head size that is no power of 2 is padded with columns of zeros in registers. W: see triton.Work.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton makes a constexpr of a literal, pyright does not know)
from dataclasses import replace

import triton
import triton.language as tl

from pallas_kernels.flash_attention.triton import Work

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
GRAIN: tl.constexpr = tl.constexpr(64)  # segments.GRAIN


@triton.jit
def _load(base, rows, STRIDE: tl.constexpr, BOUND: tl.constexpr, W: tl.constexpr):
    """Rows of one head [rows, wide], zeros past the last (if BOUND) and past the last column."""
    columns = tl.arange(0, W.wide)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if BOUND and W.wide != W.depth:
        return tl.load(pointers, mask=(rows < W.length)[:, None] & (columns < W.depth)[None, :], other=0.0)
    if BOUND:
        return tl.load(pointers, mask=(rows < W.length)[:, None], other=0.0)
    if W.wide != W.depth:
        return tl.load(pointers, mask=(columns < W.depth)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(base, rows, x, STRIDE: tl.constexpr, W: tl.constexpr):
    columns = tl.arange(0, W.wide)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(rows < W.length)[:, None] & (columns < W.depth)[None, :])


@triton.jit
def _walk(ranges, own, lo, hi, full_lo, full_hi, OWN: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr):
    """Where the walk of the tile [own, own + OWN) starts and ends, and the part that needs no mask, in whole steps."""
    if W.segments:
        blocks = ranges + (own // GRAIN + tl.arange(0, OWN // GRAIN)) * 4
        lo = tl.maximum(lo, tl.min(tl.load(blocks)))
        hi = tl.minimum(hi, tl.max(tl.load(blocks + 1)))
        full_lo = tl.maximum(full_lo, tl.max(tl.load(blocks + 2)))
        full_hi = tl.minimum(full_hi, tl.min(tl.load(blocks + 3)))
    lo = lo // STEP * STEP
    full_lo = (full_lo + STEP - 1) // STEP * STEP
    full_hi = full_hi // STEP * STEP
    none = full_hi <= full_lo
    return lo, hi, tl.where(none, lo, full_lo), tl.where(none, lo, full_hi)


@triton.jit
def _keys_of(ranges, own, W: tl.constexpr):
    """The walk over keys of a tile of queries."""
    OWN: tl.constexpr = W.queries
    lo, hi, full_lo, full_hi = own * 0, own * 0 + W.length, own * 0, own * 0 + W.length
    if W.causal:
        hi = tl.minimum(hi, own + OWN)
        full_hi = tl.minimum(full_hi, own + 1)
    if W.window > 0:
        lo = tl.maximum(lo, own - W.window + 1)
        full_lo = tl.maximum(full_lo, own + OWN - W.window)
    return _walk(ranges, own, lo, hi, full_lo, full_hi, OWN, W.keys, W)


@triton.jit
def _queries_of(ranges, own, W: tl.constexpr):
    """The walk over queries of a tile of keys."""
    OWN: tl.constexpr = W.keys
    lo, hi, full_lo, full_hi = own * 0, own * 0 + W.length, own * 0, own * 0 + W.length
    if W.causal:
        lo = tl.maximum(lo, own)
        full_lo = tl.maximum(full_lo, own + OWN - 1)
    if W.window > 0:
        hi = tl.minimum(hi, own + OWN - 1 + W.window)
        full_hi = tl.minimum(full_hi, own + W.window)
    return _walk(ranges, own, lo, hi, full_lo, full_hi, OWN, W.queries, W)


@triton.jit
def _visible(rows, columns, row_ids, column_ids, W: tl.constexpr):
    """Whether queries `rows` see keys `columns`; both of two dimensions, in either order."""
    seen = (columns < W.length) & (rows < W.length)
    if W.causal:
        seen = seen & (rows >= columns)
    if W.window > 0:
        seen = seen & (rows - columns < W.window)
    if W.segments:
        seen = seen & (row_ids == column_ids) & (row_ids != 0)
    return seen


@triton.jit
def _mixed(x):
    """A bijection of 32-bit words in which every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, head, rows, columns, W: tl.constexpr):
    """Which weights dropout keeps: dropout.kept, word for word."""
    key = _mixed(rows.to(tl.uint32) + _mixed(head.to(tl.uint32) + seed))
    return (_mixed(key ^ (columns.to(tl.uint32) * 0x9E3779B1)) >> 8).to(tl.int32) >= W.drop


@triton.jit
def _bounded(s, W: tl.constexpr):
    """x of products s: s itself, or tanh(scale s / cap)."""
    if W.cap != 0:
        return 1 - 2 / (1 + tl.exp2(s * (2 * W.scale * LOG2E / W.cap)))
    return s


@triton.jit
def _attend(
    acc, top, total, q, k, v, ids, seed, head, rows, row_ids, lo, hi, MASKED: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Softmax over the keys [lo, hi) joins the weighted sum of values, each row's maximum and sum of exponentials."""
    KEYS: tl.constexpr = W.keys
    BOUND: tl.constexpr = MASKED and W.length % KEYS != 0
    for start in tl.range(lo, hi, KEYS):
        columns = start + tl.arange(0, KEYS)
        x = _bounded(tl.dot(q, tl.trans(_load(k, columns, W.kv_stride, BOUND, W))), W)
        if MASKED:
            column_ids = tl.load(ids + columns)[None, :] if W.segments else 0
            seen = _visible(rows[:, None], columns[None, :], row_ids, column_ids, W)
            x = tl.where(seen, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 1) * W.factor)
        shift = higher
        if MASKED:  # a row may have seen nothing yet
            shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(x * W.factor - shift[:, None])
        shrink = tl.exp2(top - shift)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if W.drop > 0:
            p = tl.where(_kept(seed, head, rows[:, None], columns[None, :], W), p, 0.0)
        acc = tl.dot(p.to(v.dtype.element_ty), _load(v, columns, W.kv_stride, BOUND, W), acc)
    return acc, top, total


@triton.jit
def _place(SECTION: tl.constexpr, TILES: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(tile, head) of this program. SECTION heads at a time share the L2; their long tiles start first."""
    index = tl.program_id(0)
    section = index // (SECTION * TILES)
    rest = index % (SECTION * TILES)
    tile = rest // SECTION
    if LAST_FIRST:
        tile = TILES - 1 - tile
    return tile, section * SECTION + rest % SECTION


@triton.jit
def _tile_of_queries(ids, ranges, k, v, W: tl.constexpr):
    """Of this program's tile: which head of all, its first query and all of them; the ids and ranges of its row, keys and values
    of its key head; and where its head's queries begin."""
    tile, index = _place(W.section, (W.length + W.queries - 1) // W.queries, W.causal)
    row, head = (index // W.heads).to(tl.int64), index % W.heads
    own = tile * W.queries
    rows = own + tl.arange(0, W.queries)
    ids += row * (2 * W.padded)
    ranges += row * (2 * W.padded // GRAIN * 4)
    kv_place = row * (W.length * W.kv_stride) + head // (W.heads // W.kv_heads) * W.depth
    k += kv_place
    v += kv_place
    return index, own, rows, ids, ranges, k, v, row * (W.length * W.stride) + head * W.depth


@triton.jit
def forward_kernel(q, k, v, ids, ranges, seeds, out, lse, W: tl.constexpr):
    """out [B, S, N, D] and lse [B, N, S]; ids [B, 2, padded], ranges [B, 2, padded / GRAIN, 4]."""
    QUERIES: tl.constexpr = W.queries
    WIDE: tl.constexpr = W.wide
    index, own, rows, ids, ranges, k, v, place = _tile_of_queries(ids, ranges, k, v, W)
    queries = _load(q + place, rows, W.stride, W.length % QUERIES != 0, W)
    row_ids = tl.load(ids + rows)[:, None] if W.segments else 0
    ids += W.padded  # of the keys from here on
    seed = tl.load(seeds).to(tl.uint32) if W.drop > 0 else 0
    lo, hi, full_lo, full_hi = _keys_of(ranges, own, W)
    acc = tl.zeros([QUERIES, WIDE], tl.float32)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if W.segments or W.window > 0:
        acc, top, total = _attend(acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, lo, full_lo, True, W)
    acc, top, total = _attend(
        acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, full_lo, full_hi, False, W
    )
    if W.causal or W.window > 0 or W.segments or W.length % W.keys != 0:
        acc, top, total = _attend(acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, full_hi, hi, True, W)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    _store(out + place, rows, acc / (total * W.keep)[:, None], W.stride, W)
    logs = tl.where(empty, 0.0, (top + tl.log2(total)) * LN2)
    tl.store(lse + index.to(tl.int64) * W.length + rows, logs, mask=rows < W.length)


@triton.jit
def _keys_gradient(
    dk, dv, k, v, q, do, lse, delta, ids, seed, head, columns, column_ids, lo, hi, MASKED: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The queries [lo, hi) of one head join dk / scale and (1 - rate) dv; matrices are keys by queries here."""
    QUERIES: tl.constexpr = W.queries
    BOUND: tl.constexpr = MASKED and W.length % QUERIES != 0
    for start in tl.range(lo, hi, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        queries = _load(q, rows, W.stride, BOUND, W)
        if BOUND:
            logs, along = tl.load(lse + rows, rows < W.length, 0.0), tl.load(delta + rows, rows < W.length, 0.0)
        else:
            logs, along = tl.load(lse + rows), tl.load(delta + rows)
        x = _bounded(tl.dot(k, tl.trans(queries)), W)
        p = tl.exp2(x * W.factor - (logs * LOG2E)[None, :])
        if MASKED:
            row_ids = tl.load(ids + rows)[None, :] if W.segments else 0
            seen = _visible(rows[None, :], columns[:, None], row_ids, column_ids, W)
            p = tl.where(seen, p, 0.0)
        gradient = _load(do, rows, W.stride, BOUND, W)
        dp = tl.dot(v, tl.trans(gradient))
        if W.drop > 0:
            kept = _kept(seed, head, rows[None, :], columns[:, None], W)
            dv = tl.dot(tl.where(kept, p, 0.0).to(v.dtype), gradient, dv)
            dp = tl.where(kept, dp / W.keep, 0.0)
        else:
            dv = tl.dot(p.to(v.dtype), gradient, dv)
        ds = p * (dp - along[None, :])
        if W.cap != 0:
            ds = ds * (1 - x * x)
        dk = tl.dot(ds.to(k.dtype), queries, dk)
    return dk, dv


@triton.jit
def backward_keys_kernel(q, k, v, do, lse, delta, ids, ranges, seeds, dk, dv, W: tl.constexpr):
    """dk, dv [B, S, K, D]; delta [B, N, S] is sum_d o do, less the cotangent of lse."""
    KEYS: tl.constexpr = W.keys
    WIDE: tl.constexpr = W.wide
    tile, index = _place(W.section, (W.length + KEYS - 1) // KEYS, False)
    row, kv_head = (index // W.kv_heads).to(tl.int64), index % W.kv_heads
    own = tile * KEYS
    columns = own + tl.arange(0, KEYS)
    ids += row * (2 * W.padded)
    ranges += (2 * row + 1) * (W.padded // GRAIN * 4)
    kv_place = row * (W.length * W.kv_stride) + kv_head * W.depth
    keys = _load(k + kv_place, columns, W.kv_stride, W.length % KEYS != 0, W)
    values = _load(v + kv_place, columns, W.kv_stride, W.length % KEYS != 0, W)
    column_ids = tl.load(ids + W.padded + columns)[:, None] if W.segments else 0
    seed = tl.load(seeds).to(tl.uint32) if W.drop > 0 else 0
    lo, hi, full_lo, full_hi = _queries_of(ranges, own, W)
    dkeys = tl.zeros([KEYS, WIDE], tl.float32)
    dvalues = tl.zeros([KEYS, WIDE], tl.float32)
    for member in range(W.heads // W.kv_heads):
        head = kv_head * (W.heads // W.kv_heads) + member
        place = row * (W.length * W.stride) + head * W.depth
        per_row = (row * W.heads + head) * W.length
        hash_head = (row * W.heads + head).to(tl.int32)
        if W.causal or W.window > 0 or W.segments:
            dkeys, dvalues = _keys_gradient(
                dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
                ids, seed, hash_head, columns, column_ids, lo, full_lo, True, W,
            )  # fmt: skip
        dkeys, dvalues = _keys_gradient(
            dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
            ids, seed, hash_head, columns, column_ids, full_lo, full_hi, False, W,
        )  # fmt: skip
        if W.causal or W.window > 0 or W.segments or W.length % W.queries != 0:
            dkeys, dvalues = _keys_gradient(
                dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
                ids, seed, hash_head, columns, column_ids, full_hi, hi, True, W,
            )  # fmt: skip
    _store(dk + kv_place, columns, dkeys * W.scale, W.kv_stride, W)
    _store(dv + kv_place, columns, dvalues / W.keep, W.kv_stride, W)


@triton.jit
def _queries_gradient(
    dq, q, do, logs, along, k, v, ids, seed, head, rows, row_ids, lo, hi, MASKED: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The keys [lo, hi) join dq / scale."""
    KEYS: tl.constexpr = W.keys
    BOUND: tl.constexpr = MASKED and W.length % KEYS != 0
    for start in tl.range(lo, hi, KEYS):
        columns = start + tl.arange(0, KEYS)
        keys = _load(k, columns, W.kv_stride, BOUND, W)
        x = _bounded(tl.dot(q, tl.trans(keys)), W)
        p = tl.exp2(x * W.factor - logs[:, None])
        if MASKED:
            column_ids = tl.load(ids + columns)[None, :] if W.segments else 0
            seen = _visible(rows[:, None], columns[None, :], row_ids, column_ids, W)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(_load(v, columns, W.kv_stride, BOUND, W)))
        if W.drop > 0:
            dp = tl.where(_kept(seed, head, rows[:, None], columns[None, :], W), dp / W.keep, 0.0)
        ds = p * (dp - along[:, None])
        if W.cap != 0:
            ds = ds * (1 - x * x)
        dq = tl.dot(ds.to(q.dtype), keys, dq)
    return dq


@triton.jit
def backward_queries_kernel(q, k, v, do, lse, delta, ids, ranges, seeds, dq, W: tl.constexpr):
    """dq [B, S, N, D]."""
    QUERIES: tl.constexpr = W.queries
    WIDE: tl.constexpr = W.wide
    index, own, rows, ids, ranges, k, v, place = _tile_of_queries(ids, ranges, k, v, W)
    queries = _load(q + place, rows, W.stride, W.length % QUERIES != 0, W)
    gradient = _load(do + place, rows, W.stride, W.length % QUERIES != 0, W)
    per_row = index.to(tl.int64) * W.length + rows
    logs = tl.load(lse + per_row, rows < W.length, 0.0) * LOG2E
    along = tl.load(delta + per_row, rows < W.length, 0.0)
    row_ids = tl.load(ids + rows)[:, None] if W.segments else 0
    ids += W.padded  # of the keys from here on
    seed = tl.load(seeds).to(tl.uint32) if W.drop > 0 else 0
    lo, hi, full_lo, full_hi = _keys_of(ranges, own, W)
    acc = tl.zeros([QUERIES, WIDE], tl.float32)
    if W.segments or W.window > 0:
        acc = _queries_gradient(
            acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, lo, full_lo, True, W
        )
    acc = _queries_gradient(
        acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, full_lo, full_hi, False, W
    )
    if W.causal or W.window > 0 or W.segments or W.length % W.keys != 0:
        acc = _queries_gradient(
            acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, full_hi, hi, True, W
        )
    _store(dq + place, rows, acc * W.scale, W.stride, W)


def compile_cases() -> list[tuple]:
    """What the tests compile for GPUs they do not have."""
    arrays = dict.fromkeys(("q", "k", "v", "do", "out", "dq", "dk", "dv"), "*bf16")
    arrays |= dict.fromkeys(("lse", "delta"), "*fp32") | dict.fromkeys(("ids", "ranges", "seeds"), "*i32")
    plain = Work(
        length=512,
        heads=4,
        kv_heads=2,
        depth=128,
        wide=128,
        padded=512,
        scale=0.09,
        cap=0.0,
        causal=True,
        window=0,
        segments=False,
        drop=0,
        queries=64,
        keys=64,
        section=2,
    )
    every = replace(plain, length=500, depth=96, cap=30.0, window=100, segments=True, drop=1 << 20)
    cases = []
    for kernel in (forward_kernel, backward_keys_kernel, backward_queries_kernel):
        for work in (plain, every):
            signature = {name: kind for name, kind in arrays.items() if name in kernel.arg_names}
            cases.append((kernel, signature, {"W": work}, {"num_warps": 4, "num_stages": 2}))
    return cases
