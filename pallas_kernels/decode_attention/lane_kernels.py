"""Attention of one new position, or a few, to a cache in 8 bits, by warps that need nobody else: what a lane loads is what
tensor cores take from it.

A warp owns a piece of one row's keys and values of one key head, and up to 8 queries of that head. Of 16 positions it makes

    S^T [16 positions, 8 queries] = K Q^T         then         O^T [D, 8 queries] += V^T P^T

so that keys and values are left operands, m16n8k16 each. Lane (g, t) = (lane / 4, lane % 4) supplies rows g and g+8 of a left
operand and, in each, four of 16 columns. Which numbers of a key those are is free, if q has the same ones there; so the lane
takes 16 bytes that lie together. Of values it takes the numbers 16g.. of four positions, from which two positions' numbers
are woven into pairs; which row of O^T a number meets is free too. S^T comes out by (position g, queries 2t and 2t+1), and
P^T goes in by (query g, positions 2t and 2t+1): one transposition of 8x8 by the warp.

So nothing passes through shared memory and no warp waits for another: while a step computes, the next one's keys and this
one's values are on their way to registers. Numbers are handled as triton_kernels.py has it: codes become float16, queries
are divided by their largest number, a value's scale joins the logit. In 16 bits, where blocks of keys pass through shared memory
as fast as memory delivers them, this is no faster (bench/results/h200/trials.json).

A tensor here has an element a lane, in order, since Triton has only one layout for that.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from dataclasses import replace

import triton
import triton.language as tl

from pallas_kernels.decode_attention.triton_kernels import (
    CASE,
    FLOATS,
    INTEGERS,
    LN2,
    OLDEST,
    _log2_and_inverse,
    piece_of,
    place_of,
)
from pallas_kernels.nf4.lane_kernels import product_added

LINES: tl.constexpr = tl.constexpr(8)  # queries of a warp
FOUR = tl.constexpr("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
TWO = tl.constexpr("ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];")  # a value's, of 64 numbers
WEAVE = tl.constexpr("prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;")
PACK = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
TRANSPOSE = tl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


def _over(lanes: tuple[int, ...], operation: str) -> tl.constexpr:
    """PTX: a float32 combined with those of the lanes whose number differs in these bits."""
    steps = (f"shfl.sync.bfly.b32 o, v, {lane}, 31, 0xffffffff; {operation}.f32 v, v, o;" for lane in lanes)
    return tl.constexpr(f"{{ .reg .f32 o, v; mov.f32 v, $1; {' '.join(steps)} mov.f32 $0, v; }}")


HIGHEST_OF_ROWS, HIGHEST_OF_COLUMNS = _over((4, 8, 16), "max"), _over((1, 2), "max")
SUM_OF_ROWS = _over((4, 8, 16), "add")


@triton.jit
def _unpacked(pair, dtype: tl.constexpr):
    """The two numbers of a pair, as float32."""
    if dtype == tl.bfloat16:
        low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _packed(low, high, PTX: tl.constexpr):
    """Two float32 as a pair of float16 in an int32."""
    if PTX:
        pair = tl.inline_asm_elementwise(PACK, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low, high = low.to(tl.float16).to(tl.int16, bitcast=True), high.to(tl.float16).to(tl.int16, bitcast=True)
        pair = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return pair


@triton.jit
def _taken(place, WORDS: tl.constexpr, PTX: tl.constexpr):
    """So many int32 that lie together, asked for here and not where they are used."""
    words = ()
    if PTX and WORDS % 4 == 0:
        for i in tl.static_range(WORDS // 4):
            words += tl.inline_asm_elementwise(
                FOUR, "=r,=r,=r,=r,l", [place + 4 * i], dtype=(tl.int32,) * 4, is_pure=False, pack=1
            )
    elif PTX and WORDS == 2:
        words += tl.inline_asm_elementwise(TWO, "=r,=r,l", [place], dtype=(tl.int32,) * 2, is_pure=False, pack=1)
    else:
        for i in tl.static_range(WORDS):
            words += (tl.load(place + i),)
    return words


@triton.jit
def _keys(k, row, t, WORDS: tl.constexpr, PTX: tl.constexpr):
    """A lane's part of a key of so many words: vectors of 16 bytes, of which four lanes' lie together."""
    words = ()
    for j in tl.static_range(WORDS // 16):
        words += _taken(k + row * WORDS + j * 16 + t * 4, 4, PTX)
    return words


@triton.jit
def _byte(word, i: tl.constexpr, STORED: tl.constexpr):
    """One code of four, as float32."""
    code = (word >> 8 * i) & 255
    if STORED == "int8":
        number = ((code ^ 128) - 128).to(tl.float32)
    else:
        exponent, part = (code >> 3) & 15, (code & 7).to(tl.float32)
        size = tl.where(exponent == 0, part * 0.001953125, (8.0 + part) * tl.exp2(exponent.to(tl.float32) - 10.0))
        number = tl.where(code >= 128, -size, size)
    return number


@triton.jit
def _numbers(word, STORED: tl.constexpr, PTX: tl.constexpr):
    """The four codes of an int32 as two pairs of float16."""
    if PTX:
        CONVERT: tl.constexpr = INTEGERS if STORED == "int8" else FLOATS
        pairs = tl.inline_asm_elementwise(
            CONVERT, "=&r,=&r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        pairs = (
            _packed(_byte(word, 0, STORED), _byte(word, 1, STORED), False),
            _packed(_byte(word, 2, STORED), _byte(word, 3, STORED), False),
        )
    return pairs


@triton.jit
def _woven(x, y, PTX: tl.constexpr):
    """Codes of one position and of the next, x0 y0 x1 y1 and x2 y2 x3 y3."""
    if PTX:
        both = tl.inline_asm_elementwise(WEAVE, "=&r,=&r,r,r", [x, y], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        both = ()
        for i in tl.static_range(2):
            a, b = x >> 16 * i, y >> 16 * i
            both += ((a & 255) | ((b & 255) << 8) | (((a >> 8) & 255) << 16) | (((b >> 8) & 255) << 24),)
    return both


@triton.jit
def _transposed(pair, PTX: tl.constexpr):
    """8x8 numbers: lane (g, t) gives (g, 2t) and (g, 2t+1), and gets (2t, g) and (2t+1, g)."""
    if PTX:
        turned = tl.inline_asm_elementwise(TRANSPOSE, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low, high = pair & 0xFFFF, (pair >> 16) & 0xFFFF
        square = tl.trans(tl.reshape(tl.join(low, high), (8, 8)))
        low, high = tl.split(tl.reshape(square, (32, 2)))
        turned = low | (high << 16)
    return turned


@triton.jit
def _over_rows(x, SUM: tl.constexpr, PTX: tl.constexpr):
    """The highest, or the sum, of all lanes with the same t."""
    if PTX:
        STEPS: tl.constexpr = SUM_OF_ROWS if SUM else HIGHEST_OF_ROWS
        whole = tl.inline_asm_elementwise(STEPS, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        square = tl.reshape(x, (8, 4))
        one = tl.sum(square, axis=0) if SUM else tl.max(square, axis=0)
        whole = tl.reshape(tl.broadcast_to(one[None, :], (8, 4)), (32,))
    return whole


@triton.jit
def _highest_of_columns(x, PTX: tl.constexpr):
    """Of all lanes with the same g."""
    if PTX:
        whole = tl.inline_asm_elementwise(HIGHEST_OF_COLUMNS, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        whole = tl.reshape(tl.broadcast_to(tl.max(tl.reshape(x, (8, 4)), axis=1)[:, None], (8, 4)), (32,))
    return whole


@triton.jit
def _of_line(x, line, PTX: tl.constexpr):
    """What the lanes with g = line hold."""
    if PTX:
        there = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [x, line * 4],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        there = tl.gather(x, line * 4, 0)
    return there


@triton.jit
def _queries(q, at, real, t, D: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """A lane's part of query g for every 16 numbers, a pair and a pair; and what they were divided by."""
    pairs, scaled, largest = (), (), tl.full((32,), 0.0, tl.float32)
    for s in tl.static_range(D // 16):
        depth = s // 4 * 64 + t * 16 + s % 4 * 4
        for i in tl.static_range(2):
            pair = tl.load(q + (at * D + depth) // 2 + i, mask=real, other=0)
            low, high = _unpacked(pair, dtype)
            largest = tl.maximum(largest, tl.maximum(tl.abs(low), tl.abs(high)))
            pairs += (pair,)
    largest = _highest_of_columns(largest, PTX)
    inverse = 1.0 / tl.where(largest > 0, largest, 1.0)
    for i in tl.static_range(D // 8):
        low, high = _unpacked(pairs[i], dtype)
        scaled += (_packed(low * inverse, high * inverse, PTX),)
    return scaled, largest


@triton.jit
def lanes_kernel(q, k, v, k_scales, v_scales, lengths, layers, out, lse, W: tl.constexpr):
    """As decode_kernel: q [B, T, N, D], k and v [L, B, K, C, D] -> out [P, B, T, N, D] and lse [P, B, T, N], for T N / K <= 8."""
    row, group, piece = tl.program_id(0) // W.kv_heads, tl.program_id(0) % W.kv_heads, tl.program_id(1)
    D: tl.constexpr = W.depth
    POSITIONS: tl.constexpr = W.positions
    STORED: tl.constexpr = W.stored
    PTX: tl.constexpr = W.ptx
    WORDS: tl.constexpr = D // 4  # words of a key
    PART: tl.constexpr = WORDS // 8  # of a value, that a lane takes
    LIFT: tl.constexpr = 14  # what weights are larger by, in powers of two
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    line = tl.minimum(g, W.lines - 1)
    at = (row * W.new + line // W.group) * W.heads + group * W.group + line % W.group
    words = q.to(tl.pointer_type(tl.int32), bitcast=True)
    queries, largest = _queries(words, at, g < W.lines, t, D, q.dtype.element_ty, PTX)
    factors = _of_line(largest, 2 * t, PTX) * W.factor, _of_line(largest, 2 * t + 1, PTX) * W.factor

    length = tl.load(lengths + row)
    first, last, end = piece_of(length, piece, W)
    base = place_of(layers, row, group, W)
    k = k.to(tl.pointer_type(tl.int32), bitcast=True) + base * WORDS
    v = v.to(tl.pointer_type(tl.int32), bitcast=True) + base * WORDS
    k_scales += base
    v_scales += base

    keys = ()
    for i in tl.static_range(POSITIONS // 8):
        keys += _keys(k, tl.minimum(first + i * 8 + g, end - 1), t, WORDS, PTX)
    sums = ()
    for _ in tl.static_range(D // 4):
        sums += (tl.full((32,), 0.0, tl.float32),)
    highest = (tl.full((32,), float("-inf"), tl.float32), tl.full((32,), float("-inf"), tl.float32))
    total = (tl.full((32,), 0.0, tl.float32), tl.full((32,), 0.0, tl.float32))
    for start in range(first, last, POSITIONS):
        values, scales, inverses = (), (), ()
        for i in tl.static_range(POSITIONS // 8):
            place = tl.minimum(start + i * 8 + g, end - 1)
            log2, inverse = _log2_and_inverse(tl.load(v_scales + place), PTX)
            scales += (tl.load(k_scales + place), log2)
            inverses += (inverse,)
            for n in tl.static_range(2):
                values += _taken(v + tl.minimum(start + i * 8 + 2 * t + n, end - 1) * WORDS + g * PART, PART, PTX)

        logits = ()
        for i in tl.static_range(POSITIONS // 16):
            s = (tl.full((32,), 0.0, tl.float32),) * 4
            for j in tl.static_range(D // 16):
                a0, a2 = _numbers(keys[2 * i * (WORDS // 4) + j], STORED, PTX)
                a1, a3 = _numbers(keys[(2 * i + 1) * (WORDS // 4) + j], STORED, PTX)
                s = product_added((a0, a1, a2, a3), queries[2 * j], queries[2 * j + 1], s, tl.float16, 1, PTX)
            for n in tl.static_range(4):  # position g or g + 8, query 2t or 2t + 1
                logit = s[n] * factors[n % 2] * scales[4 * i + n // 2 * 2] + scales[4 * i + n // 2 * 2 + 1]
                place = start + i * 16 + n // 2 * 8 + g
                seen = place < last
                if W.new > 1:  # a single new position sees all that is held
                    seen &= place <= length + (2 * t + n % 2) // W.group
                if W.window > 0:
                    seen &= place > length + (2 * t + n % 2) // W.group - W.window
                logits += (tl.where(seen, logit, float("-inf")),)

        keys = ()
        for i in tl.static_range(POSITIONS // 8):
            keys += _keys(k, tl.minimum(start + POSITIONS + i * 8 + g, end - 1), t, WORDS, PTX)

        higher, shifts, before = (), (), ()
        for n in tl.static_range(2):
            most = logits[n]
            for i in tl.static_range(1, POSITIONS // 8):
                most = tl.maximum(most, logits[2 * i + n])
            most = tl.maximum(highest[n], _over_rows(most, False, PTX) - LIFT)
            shift = tl.where(most == float("-inf"), 0.0, most)  # of positions of which a query sees nothing
            higher += (most,)
            shifts += (shift,)
            before += (tl.exp2(highest[n] - shift),)
        highest = higher
        first_total, second_total = total[0] * before[0], total[1] * before[1]
        weights = ()
        for i in tl.static_range(POSITIONS // 8):
            low, high = tl.exp2(logits[2 * i] - shifts[0]), tl.exp2(logits[2 * i + 1] - shifts[1])
            first_total += low * inverses[i]
            second_total += high * inverses[i]
            weights += (_transposed(_packed(low, high, PTX), PTX),)
        total = (first_total, second_total)

        scaled = ()
        for i in tl.static_range(D // 4):
            scaled += (sums[i] * before[i % 2],)
        for i in tl.static_range(POSITIONS // 16):
            added = ()
            for w in tl.static_range(PART):
                # positions 2t and 2t+1 of the first eight, then of the last
                near = _woven(values[4 * i * PART + w], values[(4 * i + 1) * PART + w], PTX)
                far = _woven(values[(4 * i + 2) * PART + w], values[(4 * i + 3) * PART + w], PTX)
                for n in tl.static_range(2):
                    a0, a1 = _numbers(near[n], STORED, PTX)
                    a2, a3 = _numbers(far[n], STORED, PTX)
                    d = ()
                    for c in tl.static_range(4):
                        d += (scaled[4 * (2 * w + n) + c],)
                    added += product_added((a0, a1, a2, a3), weights[2 * i], weights[2 * i + 1], d, tl.float16, 1, PTX)
            scaled = added
        sums = scaled

    for n in tl.static_range(2):
        line = 2 * t + n
        there = line < W.lines
        at = ((piece * W.batch + row) * W.new + line // W.group) * W.heads + group * W.group + line % W.group
        whole = _over_rows(total[n], True, PTX)
        empty = whole == 0.0
        part = 1.0 / tl.where(empty, 1.0, whole)
        for m in tl.static_range(D // 16):
            for lower in tl.static_range(2):
                y = (sums[4 * m + 2 * lower + n] * part).to(out.dtype.element_ty)
                tl.store(out + at.to(tl.int64) * D + g * (D // 8) + 2 * m + lower, y, mask=there)
        weight = tl.where(empty, float("-inf"), (highest[n] + tl.log2(tl.where(empty, 1.0, whole))) * LN2)
        tl.store(lse + at, weight, mask=there & (g == 0))


def compile_cases():
    """What tests compile for every supported architecture."""
    signature = {"lengths": "*i32", "layers": "*i32", "out": "*fp32", "lse": "*fp32"}
    signature |= {"k_scales": "*fp32", "v_scales": "*fp32"}
    work = replace(CASE, new=2, depth=64, stored="int8", window=1000, positions=16, span=64)
    for name, case in (("i8", work), ("fp8e4nv", replace(work, new=1, depth=128, stored="float8_e4m3fn", window=0))):
        own = {"q": "*bf16"} | dict.fromkeys("kv", f"*{name}")
        yield lanes_kernel, signature | own, {"W": case}, {"num_warps": 1, "oldest": OLDEST.get(name, 80)}
