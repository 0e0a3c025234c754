"""Attention as Triton kernels: forward, gradient of keys and values, gradient of queries.

The math is that of `op.py`. A program of the forward and of the queries' gradient owns BM queries of one head and walks
over blocks of BN keys; a program of the keys' gradient owns BN keys of one key/value head and walks over the blocks of
BM queries of each of the head's query heads, so that grouped heads are summed in registers. Nothing is added atomically:
results do not depend on the order of programs. That costs seven matrix products in the backward pass instead of five.

Which blocks a walk visits follows from causal order, window and segments (`segments.py`), and is cut in three: blocks
where a pair may be invisible at both ends, blocks that need no mask between them (`_walk`). Logits are kept as x with
log2(e) t = x FACTOR: one multiply-add before exp2 for both the scale and the change of base; with a cap, x is the tanh.
A head size that is no power of 2 is padded to DP columns of zeros in registers.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton makes a constexpr of a literal, pyright does not know)
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
GRAIN: tl.constexpr = tl.constexpr(64)  # segments.GRAIN


@triton.jit
def _load(base, rows, S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BOUND: tl.constexpr):
    """Rows of one head [rows, DP], zeros past row S (if BOUND) and past column D."""
    columns = tl.arange(0, DP)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if BOUND and DP != D:
        return tl.load(pointers, mask=(rows < S)[:, None] & (columns < D)[None, :], other=0.0)
    if BOUND:
        return tl.load(pointers, mask=(rows < S)[:, None], other=0.0)
    if DP != D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(base, rows, x, S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    columns = tl.arange(0, DP)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(rows < S)[:, None] & (columns < D)[None, :])


@triton.jit
def _walk(
    ranges, own, lo, hi, full_lo, full_hi, SEGMENTS: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Where the walk of the tile [own, own + OWN) starts and ends, and the part that needs no mask, in whole steps."""
    if SEGMENTS:
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
def _keys_of(
    ranges, own, S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The walk over keys of the queries [own, own + OWN)."""
    lo, hi, full_lo, full_hi = own * 0, own * 0 + S, own * 0, own * 0 + S
    if CAUSAL:
        hi = tl.minimum(hi, own + OWN)
        full_hi = tl.minimum(full_hi, own + 1)
    if WINDOW > 0:
        lo = tl.maximum(lo, own - WINDOW + 1)
        full_lo = tl.maximum(full_lo, own + OWN - WINDOW)
    return _walk(ranges, own, lo, hi, full_lo, full_hi, SEGMENTS, OWN, STEP)


@triton.jit
def _queries_of(
    ranges, own, S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The walk over queries of the keys [own, own + OWN)."""
    lo, hi, full_lo, full_hi = own * 0, own * 0 + S, own * 0, own * 0 + S
    if CAUSAL:
        lo = tl.maximum(lo, own)
        full_lo = tl.maximum(full_lo, own + OWN - 1)
    if WINDOW > 0:
        hi = tl.minimum(hi, own + OWN - 1 + WINDOW)
        full_hi = tl.minimum(full_hi, own + WINDOW)
    return _walk(ranges, own, lo, hi, full_lo, full_hi, SEGMENTS, OWN, STEP)


@triton.jit
def _visible(
    rows, columns, row_ids, column_ids,
    S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Whether queries `rows` see keys `columns`; both of two dimensions, in either order."""
    seen = (columns < S) & (rows < S)
    if CAUSAL:
        seen = seen & (rows >= columns)
    if WINDOW > 0:
        seen = seen & (rows - columns < WINDOW)
    if SEGMENTS:
        seen = seen & (row_ids == column_ids) & (row_ids != 0)
    return seen


@triton.jit
def _mixed(x):
    """A bijection of 32-bit words in which every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, head, rows, columns, DROP: tl.constexpr):
    """Which weights dropout keeps: dropout.kept, word for word."""
    key = _mixed(rows.to(tl.uint32) + _mixed(head.to(tl.uint32) + seed))
    return (_mixed(key ^ (columns.to(tl.uint32) * 0x9E3779B1)) >> 8).to(tl.int32) >= DROP


@triton.jit
def _bounded(s, SCALE: tl.constexpr, CAP: tl.constexpr):
    """x of products s: s itself, or tanh(scale s / cap)."""
    if CAP != 0:
        return 1 - 2 / (1 + tl.exp2(s * (2 * SCALE * LOG2E / CAP)))
    return s


@triton.jit
def _attend(
    acc, top, total, q, k, v, ids, seed, head, rows, row_ids, lo, hi, MASKED: tl.constexpr,
    S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, DROP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys [lo, hi) joins the weighted sum of values, each row's maximum and sum of exponentials."""
    FACTOR: tl.constexpr = CAP * LOG2E if CAP != 0 else SCALE * LOG2E
    BOUND: tl.constexpr = MASKED and S % BN != 0
    for start in tl.range(lo, hi, BN):
        columns = start + tl.arange(0, BN)
        x = _bounded(tl.dot(q, tl.trans(_load(k, columns, S, STRIDE, D, DP, BOUND))), SCALE, CAP)
        if MASKED:
            column_ids = tl.load(ids + columns)[None, :] if SEGMENTS else 0
            seen = _visible(rows[:, None], columns[None, :], row_ids, column_ids, S, CAUSAL, WINDOW, SEGMENTS)
            x = tl.where(seen, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 1) * FACTOR)
        shift = higher
        if MASKED:  # a row may have seen nothing yet
            shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(x * FACTOR - shift[:, None])
        shrink = tl.exp2(top - shift)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if DROP > 0:
            p = tl.where(_kept(seed, head, rows[:, None], columns[None, :], DROP), p, 0.0)
        acc = tl.dot(p.to(v.dtype.element_ty), _load(v, columns, S, STRIDE, D, DP, BOUND), acc)
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
def forward_kernel(
    q, k, v, ids, ranges, seeds, out, lse,
    S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PADDED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """out [B, S, N, D] and lse [B, N, S]; ids [B, 2, PADDED], ranges [B, 2, PADDED / GRAIN, 4]; DROP of 2^24 weights go."""
    tile, index = _place(SECTION, (S + BM - 1) // BM, CAUSAL)
    row, head = (index // N).to(tl.int64), index % N
    own = tile * BM
    rows = own + tl.arange(0, BM)
    ids += row * (2 * PADDED)
    ranges += row * (2 * PADDED // GRAIN * 4)
    kv_place = row * (S * K * D) + head // (N // K) * D
    k += kv_place
    v += kv_place
    place = row * (S * N * D) + head * D
    queries = _load(q + place, rows, S, N * D, D, DP, S % BM != 0)
    row_ids = tl.load(ids + rows)[:, None] if SEGMENTS else 0
    ids += PADDED  # of the keys from here on
    seed = tl.load(seeds).to(tl.uint32) if DROP > 0 else 0
    lo, hi, full_lo, full_hi = _keys_of(ranges, own, S, CAUSAL, WINDOW, SEGMENTS, BM, BN)
    acc = tl.zeros([BM, DP], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SEGMENTS or WINDOW > 0:
        acc, top, total = _attend(
            acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, lo, full_lo, True,
            S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, full_lo, full_hi, False,
        S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
    )  # fmt: skip
    if CAUSAL or WINDOW > 0 or SEGMENTS or S % BN != 0:
        acc, top, total = _attend(
            acc, top, total, queries, k, v, ids, seed, index, rows, row_ids, full_hi, hi, True,
            S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
        )  # fmt: skip
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    KEEP: tl.constexpr = 1 - DROP / 16777216
    _store(out + place, rows, acc / (total * KEEP)[:, None], S, N * D, D, DP)
    logs = tl.where(empty, 0.0, (top + tl.log2(total)) * LN2)
    tl.store(lse + index.to(tl.int64) * S + rows, logs, mask=rows < S)


@triton.jit
def _keys_gradient(
    dk, dv, k, v, q, do, lse, delta, ids, seed, head, columns, column_ids, lo, hi, MASKED: tl.constexpr,
    S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The queries [lo, hi) of one head join dk / scale and (1 - rate) dv; matrices are keys by queries here."""
    FACTOR: tl.constexpr = CAP * LOG2E if CAP != 0 else SCALE * LOG2E
    BOUND: tl.constexpr = MASKED and S % BM != 0
    KEEP: tl.constexpr = 1 - DROP / 16777216
    for start in tl.range(lo, hi, BM):
        rows = start + tl.arange(0, BM)
        queries = _load(q, rows, S, STRIDE, D, DP, BOUND)
        if BOUND:
            logs, along = tl.load(lse + rows, rows < S, 0.0), tl.load(delta + rows, rows < S, 0.0)
        else:
            logs, along = tl.load(lse + rows), tl.load(delta + rows)
        x = _bounded(tl.dot(k, tl.trans(queries)), SCALE, CAP)
        p = tl.exp2(x * FACTOR - (logs * LOG2E)[None, :])
        if MASKED:
            row_ids = tl.load(ids + rows)[None, :] if SEGMENTS else 0
            seen = _visible(rows[None, :], columns[:, None], row_ids, column_ids, S, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(seen, p, 0.0)
        gradient = _load(do, rows, S, STRIDE, D, DP, BOUND)
        dp = tl.dot(v, tl.trans(gradient))
        if DROP > 0:
            kept = _kept(seed, head, rows[None, :], columns[:, None], DROP)
            dv = tl.dot(tl.where(kept, p, 0.0).to(v.dtype), gradient, dv)
            dp = tl.where(kept, dp / KEEP, 0.0)
        else:
            dv = tl.dot(p.to(v.dtype), gradient, dv)
        ds = p * (dp - along[None, :])
        if CAP != 0:
            ds = ds * (1 - x * x)
        dk = tl.dot(ds.to(k.dtype), queries, dk)
    return dk, dv


@triton.jit
def backward_keys_kernel(
    q, k, v, do, lse, delta, ids, ranges, seeds, dk, dv,
    S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PADDED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, S, K, D]; delta [B, N, S] is sum_d o do, less the cotangent of lse."""
    tile, index = _place(SECTION, (S + BN - 1) // BN, False)
    row, kv_head = (index // K).to(tl.int64), index % K
    own = tile * BN
    columns = own + tl.arange(0, BN)
    ids += row * (2 * PADDED)
    ranges += (2 * row + 1) * (PADDED // GRAIN * 4)
    kv_place = row * (S * K * D) + kv_head * D
    keys = _load(k + kv_place, columns, S, K * D, D, DP, S % BN != 0)
    values = _load(v + kv_place, columns, S, K * D, D, DP, S % BN != 0)
    column_ids = tl.load(ids + PADDED + columns)[:, None] if SEGMENTS else 0
    seed = tl.load(seeds).to(tl.uint32) if DROP > 0 else 0
    lo, hi, full_lo, full_hi = _queries_of(ranges, own, S, CAUSAL, WINDOW, SEGMENTS, BN, BM)
    dkeys = tl.zeros([BN, DP], tl.float32)
    dvalues = tl.zeros([BN, DP], tl.float32)
    for member in range(N // K):
        head = kv_head * (N // K) + member
        place = row * (S * N * D) + head * D
        per_row = (row * N + head) * S
        hash_head = (row * N + head).to(tl.int32)
        if CAUSAL or WINDOW > 0 or SEGMENTS:
            dkeys, dvalues = _keys_gradient(
                dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
                ids, seed, hash_head, columns, column_ids, lo, full_lo, True,
                S, N * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BM,
            )  # fmt: skip
        dkeys, dvalues = _keys_gradient(
            dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
            ids, seed, hash_head, columns, column_ids, full_lo, full_hi, False,
            S, N * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BM,
        )  # fmt: skip
        if CAUSAL or WINDOW > 0 or SEGMENTS or S % BM != 0:
            dkeys, dvalues = _keys_gradient(
                dkeys, dvalues, keys, values, q + place, do + place, lse + per_row, delta + per_row,
                ids, seed, hash_head, columns, column_ids, full_hi, hi, True,
                S, N * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BM,
            )  # fmt: skip
    KEEP: tl.constexpr = 1 - DROP / 16777216
    _store(dk + kv_place, columns, dkeys * SCALE, S, K * D, D, DP)
    _store(dv + kv_place, columns, dvalues / KEEP, S, K * D, D, DP)


@triton.jit
def _queries_gradient(
    dq, q, do, logs, along, k, v, ids, seed, head, rows, row_ids, lo, hi, MASKED: tl.constexpr,
    S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, DROP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys [lo, hi) join dq / scale."""
    FACTOR: tl.constexpr = CAP * LOG2E if CAP != 0 else SCALE * LOG2E
    BOUND: tl.constexpr = MASKED and S % BN != 0
    KEEP: tl.constexpr = 1 - DROP / 16777216
    for start in tl.range(lo, hi, BN):
        columns = start + tl.arange(0, BN)
        keys = _load(k, columns, S, STRIDE, D, DP, BOUND)
        x = _bounded(tl.dot(q, tl.trans(keys)), SCALE, CAP)
        p = tl.exp2(x * FACTOR - logs[:, None])
        if MASKED:
            column_ids = tl.load(ids + columns)[None, :] if SEGMENTS else 0
            seen = _visible(rows[:, None], columns[None, :], row_ids, column_ids, S, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(_load(v, columns, S, STRIDE, D, DP, BOUND)))
        if DROP > 0:
            dp = tl.where(_kept(seed, head, rows[:, None], columns[None, :], DROP), dp / KEEP, 0.0)
        ds = p * (dp - along[:, None])
        if CAP != 0:
            ds = ds * (1 - x * x)
        dq = tl.dot(ds.to(q.dtype), keys, dq)
    return dq


@triton.jit
def backward_queries_kernel(
    q, k, v, do, lse, delta, ids, ranges, seeds, dq,
    S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PADDED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """dq [B, S, N, D]."""
    tile, index = _place(SECTION, (S + BM - 1) // BM, CAUSAL)
    row, head = (index // N).to(tl.int64), index % N
    own = tile * BM
    rows = own + tl.arange(0, BM)
    ids += row * (2 * PADDED)
    ranges += row * (2 * PADDED // GRAIN * 4)
    kv_place = row * (S * K * D) + head // (N // K) * D
    k += kv_place
    v += kv_place
    place = row * (S * N * D) + head * D
    queries = _load(q + place, rows, S, N * D, D, DP, S % BM != 0)
    gradient = _load(do + place, rows, S, N * D, D, DP, S % BM != 0)
    per_row = index.to(tl.int64) * S + rows
    logs = tl.load(lse + per_row, rows < S, 0.0) * LOG2E
    along = tl.load(delta + per_row, rows < S, 0.0)
    row_ids = tl.load(ids + rows)[:, None] if SEGMENTS else 0
    ids += PADDED  # of the keys from here on
    seed = tl.load(seeds).to(tl.uint32) if DROP > 0 else 0
    lo, hi, full_lo, full_hi = _keys_of(ranges, own, S, CAUSAL, WINDOW, SEGMENTS, BM, BN)
    acc = tl.zeros([BM, DP], tl.float32)
    if SEGMENTS or WINDOW > 0:
        acc = _queries_gradient(
            acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, lo, full_lo, True,
            S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
        )  # fmt: skip
    acc = _queries_gradient(
        acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, full_lo, full_hi, False,
        S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
    )  # fmt: skip
    if CAUSAL or WINDOW > 0 or SEGMENTS or S % BN != 0:
        acc = _queries_gradient(
            acc, queries, gradient, logs, along, k, v, ids, seed, index, rows, row_ids, full_hi, hi, True,
            S, K * D, D, DP, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, DROP, BN,
        )  # fmt: skip
    _store(dq + place, rows, acc * SCALE, S, N * D, D, DP)


def compile_cases() -> list[tuple]:
    """What the tests compile for GPUs they do not have."""
    arrays = dict.fromkeys(("q", "k", "v", "do", "out", "dq", "dk", "dv"), "*bf16")
    arrays |= dict.fromkeys(("lse", "delta"), "*fp32") | dict.fromkeys(("ids", "ranges", "seeds"), "*i32")
    plain = {"S": 512, "N": 4, "K": 2, "D": 128, "DP": 128, "PADDED": 512, "SCALE": 0.09, "CAP": 0.0, "CAUSAL": True}
    plain |= {"WINDOW": 0, "SEGMENTS": False, "DROP": 0, "BM": 64, "BN": 64, "SECTION": 2}
    every = plain | {"S": 500, "D": 96, "CAP": 30.0, "WINDOW": 100, "SEGMENTS": True, "DROP": 1 << 20, "BN": 64}
    cases = []
    for kernel in (forward_kernel, backward_keys_kernel, backward_queries_kernel):
        for constants in (plain, every):
            signature = {name: kind for name, kind in arrays.items() if name in kernel.arg_names}
            cases.append((kernel, signature, constants, {"num_warps": 4, "num_stages": 2}))
    return cases
