"""What the lanes of a warp do in `linears`: look up levels by the byte, and multiply on tensor cores.

Tensors here have an element a thread, in order, since Triton has only one layout for them; the lane is the index
modulo 32. Both are done through PTX, as Triton's own gathers and products cannot be made to take what they need straight
from registers. Without PTX (interpreted, for tests) they are spelled out.

Four inputs of a row in an int64 make pairs with four others; a pair of 16-bit numbers in an int32 is what tensor cores
take. Lane (g, t) = (lane / 4, lane % 4) supplies outputs g and g+8 and, of a block, bytes 8t..8t+7.
"""

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.nf4.codebook import NF4_LEVELS


def _decoder(dtype: type) -> str:
    """PTX: a word of codes $4 -> levels of its low nibbles $0 $1 and of its high nibbles $2 $3.

    prmt picks four bytes of eight by four 4-bit selectors, and half a word of codes is just that. The low three bits of
    a code select among levels 0..7 and among 8..15, from a table of the levels' high bytes and one of their low bytes;
    the top bit chooses between the two.
    """
    levels = NF4_LEVELS.astype(dtype).view(np.uint16)
    high, low = ([f"0x{word:08X}" for word in part.astype(np.uint8).view(np.uint32)] for part in (levels >> 8, levels))

    def half(even: str, odd: str) -> str:
        return f"""
        prmt.b32 upper, 0x0000FF00, 0, top;
        prmt.b32 a, {high[0]}, {high[1]}, code;
        prmt.b32 b, {high[2]}, {high[3]}, code;
        lop3.b32 h, upper, b, a, 0xCA;
        prmt.b32 a, {low[0]}, {low[1]}, code;
        prmt.b32 b, {low[2]}, {low[3]}, code;
        lop3.b32 l, upper, b, a, 0xCA;
        prmt.b32 {even}, l, h, 0x6240;
        prmt.b32 {odd}, l, h, 0x7351;"""

    return f"""{{
        .reg .b32 code, top, upper, a, b, h, l;
        and.b32 code, $4, 0x77777777;
        shr.b32 top, $4, 3;
        and.b32 top, top, 0x11111111;{half("$0", "$2")}
        shr.b32 code, code, 16;
        shr.b32 top, top, 16;{half("$1", "$3")}
    }}"""


def _product(kind: str) -> str:
    rows = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13}"
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {rows};"


DECODE_BF16 = tl.constexpr(_decoder(ml_dtypes.bfloat16))
DECODE_F16 = tl.constexpr(_decoder(np.float16))
PRODUCT_BF16 = tl.constexpr(_product("bf16"))
PRODUCT_F16 = tl.constexpr(_product("f16"))
# at the function's own level, so that the name holds in all of it; the statement must therefore occur once
TABLE = tl.constexpr(".shared .align 128 .b32 nf4_table[12032];\n mov.u32 $0, nf4_table;")
TABLE_BYTES = tl.constexpr(48128)  # of the pairs of levels, the map of scales and room for sums; by itself
SUMS_BYTES = tl.constexpr(33792)  # where the room for sums begins
COPY = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $1;")
STORE = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
LOAD = tl.constexpr("ld.shared.f32 $0, [$1];")
SCALE = tl.constexpr("{ .reg .b32 at; and.b32 at, $1, 255; mad.lo.u32 at, at, 4, $2; ld.shared.f32 $0, [at]; }")
LOADS = "".join(f"ld.shared.b32 ${i}, [at{i}];\n" for i in range(4))
LOOKUP = tl.constexpr(
    "{ .reg .b32 at<4>;\n"
    + "".join(f"prmt.b32 at{i}, $4, 0, 0x444{i}; mad.lo.u32 at{i}, at{i}, 128, $5;\n" for i in range(4))
    + LOADS
    + "}"
)
# a byte in the second place of a word is its pair's address already, beside the lane's in the first
LOOKUP_WIDE = tl.constexpr(
    "{ .reg .b32 at<4>;\n"
    + "".join(f"prmt.b32 at{i}, $4, $6, 0x65{i}4; add.u32 at{i}, at{i}, $5;\n" for i in range(4))
    + LOADS
    + "}"
)


@triton.jit
def loads_stay_above(thread):
    """Loads above this are issued before what is below; left to the compiler they are put off to where their results are
    used, and then waited for. A barrier of a warp, which holds nothing up, keeps them."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def settled(value):
    """The same float32, computed before any barrier that comes later: not pure, so that it keeps its place, as pure
    lookups that lead to it need not."""
    return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _woven(low, high):
    """Four 16-bit numbers in an int64 and four in another -> four int32, each a pair of one of either."""
    l0, l1 = low.to(tl.int32), (low >> 32).to(tl.int32)
    h0, h1 = high.to(tl.int32), (high >> 32).to(tl.int32)
    return (
        (l0 & 0xFFFF) | (h0 << 16),
        ((l0 >> 16) & 0xFFFF) | (h0 & -65536),
        (l1 & 0xFFFF) | (h1 << 16),
        ((l1 >> 16) & 0xFFFF) | (h1 & -65536),
    )


@triton.jit
def place():
    """Where in shared memory there is room for `tables` and sums; a kernel asks once."""
    return tl.inline_asm_elementwise(TABLE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def tables(start, nested_map, dtype: tl.constexpr, PITCH: tl.constexpr, DOUBLE: tl.constexpr, THREADS: tl.constexpr):
    """The pairs of levels of all bytes, 32 times, in shared memory from `start` on, PITCH bytes from each to the next, and the
    map of scales; -> the same `start`, for what has to come after.

    A thread makes the pairs of four bytes and writes an even share of their copies, sixteen bytes at a time; that
    neighbours start in different banks keeps them from waiting for each other.
    """
    PARTS: tl.constexpr = THREADS // 64
    DECODE: tl.constexpr = DECODE_BF16 if dtype == tl.bfloat16 else DECODE_F16
    tl.static_assert(PARTS >= 1 and PARTS <= 8)
    thread = tl.arange(0, THREADS)
    four = thread % 64
    l0, l1, h0, h1 = tl.inline_asm_elementwise(
        DECODE, "=r,=r,=r,=r,r", [0x03020100 + 0x04040404 * four], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )
    low = (l0.to(tl.int64) & 0xFFFFFFFF) | (l1.to(tl.int64) << 32)
    high = (h0.to(tl.int64) & 0xFFFFFFFF) | (h1.to(tl.int64) << 32)
    pairs = _woven(low, high)
    for i in tl.static_range(4):
        for j in tl.static_range(8 // PARTS):
            place = start + (four * 4 + i) * PITCH + (thread // 64 * (8 // PARTS) + j + four) % 8 * 16
            tl.inline_asm_elementwise(COPY, "=r,r,r", [place, pairs[i]], dtype=tl.int32, is_pure=False, pack=1)
    if DOUBLE:
        for first in tl.static_range(0, 256, THREADS):  # over 256 threads write some values twice
            i = (first + thread) % 256
            put(start + 256 * PITCH + i * 4, tl.load(nested_map + i))
    tl.debug_barrier()
    # not pure, so that no lookup, which needs its result, moves before the barrier
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [start], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def put(place, value):
    """A float32 into shared memory."""
    tl.inline_asm_elementwise(STORE, "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def got(place):
    """A float32 of shared memory, as it is after the barrier before this."""
    return tl.inline_asm_elementwise(LOAD, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def scale_of(code, table, nested_map, PITCH: tl.constexpr, PTX: tl.constexpr):
    """The entry of the map of scales that the lowest byte of `code` selects. `table` and PITCH: see `tables`."""
    if PTX:
        entry = tl.inline_asm_elementwise(
            SCALE, "=f,r,r", [code, table + 256 * PITCH], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        entry = tl.load(nested_map + (code & 255))
    return entry


@triton.jit
def pairs_of(word, table, levels, dtype: tl.constexpr, PITCH: tl.constexpr, PTX: tl.constexpr):
    """Levels of the low and of the high nibble of each of four bytes. `table` and PITCH: see `tables`."""
    lane = tl.arange(0, word.shape[0]) % 32 * 4
    if PTX and PITCH == 256:
        pairs = tl.inline_asm_elementwise(
            LOOKUP_WIDE, "=r,=r,=r,=r,r,r,r", [word, table, lane], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    elif PTX:
        pairs = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r,r", [word, table + lane], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        pairs = ()
        for i in tl.static_range(4):
            low = tl.load(levels + ((word >> 8 * i) & 15)).to(dtype).to(tl.int16, bitcast=True)
            high = tl.load(levels + ((word >> 8 * i + 4) & 15)).to(dtype).to(tl.int16, bitcast=True)
            pairs += ((low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16),)
    return pairs


@triton.jit
def halves(pair, dtype: tl.constexpr):
    low, high = pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _outer(a, b, dtype: tl.constexpr, WARPS: tl.constexpr):
    """sum over lanes t of a[g, t] b[n, t], pairs multiplied element by element: at lane (g, t) for n = 2t and 2t+1."""
    a_low, a_high = halves(tl.reshape(a, (WARPS, 8, 1, 4)), dtype)
    b_low, b_high = halves(tl.reshape(b, (WARPS, 1, 8, 4)), dtype)
    sums = tl.sum(a_low * b_low + a_high * b_high, axis=3)
    return tl.split(tl.reshape(sums, (WARPS * 32, 2)))


@triton.jit
def product_added(a, b0, b1, d, dtype: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr):
    """d + A B in each warp. Lane (g, t) holds pairs of inputs: of A's rows g, g+8, g and g+8, of B's column g twice;
    and of d rows g, g, g+8, g+8 at columns 2t, 2t+1, 2t, 2t+1."""
    if PTX:
        PRODUCT: tl.constexpr = PRODUCT_BF16 if dtype == tl.bfloat16 else PRODUCT_F16
        result = tl.inline_asm_elementwise(
            PRODUCT,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]],
            dtype=(tl.float32,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        p0, p1 = _outer(a[0], b0, dtype, WARPS)
        q0, q1 = _outer(a[2], b1, dtype, WARPS)
        p2, p3 = _outer(a[1], b0, dtype, WARPS)
        q2, q3 = _outer(a[3], b1, dtype, WARPS)
        result = d[0] + p0 + q0, d[1] + p1 + q1, d[2] + p2 + q2, d[3] + p3 + q3
    return result


@triton.jit
def x_pairs(x, row, block, t, mask, SCALE_COLUMNS: tl.constexpr):
    """A row's eight pairs (8t+i, 8t+i+32) of a block, for i = 0..7; x as int64, four numbers each."""
    at = x + row * (SCALE_COLUMNS * 16) + block * 16 + t * 2
    first = _woven(tl.load(at, mask=mask, other=0), tl.load(at + 8, mask=mask, other=0))
    return first + _woven(tl.load(at + 1, mask=mask, other=0), tl.load(at + 9, mask=mask, other=0))
