"""What comes before each product of `between_attentions`: its input's norm, and LoRA's low-rank product of it."""

import triton
import triton.language as tl

from pallas_kernels.between_attentions.meeting_kernels import block_sums
from pallas_kernels.nf4.lane_kernels import halves
from pallas_kernels.nf4.tile_kernels import words

FOUR = tl.constexpr("""{
    .reg .pred p;
    setp.ne.b32 p, $5, 0;
    mov.f32 $0, 0f00000000;
    mov.f32 $1, 0f00000000;
    mov.f32 $2, 0f00000000;
    mov.f32 $3, 0f00000000;
    @p ld.global.v4.f32 {$0, $1, $2, $3}, [$4];
}""")


@triton.jit
def _eight(x, mask):
    """Neighbouring 16-bit numbers of each thread, as float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    at = x.to(tl.pointer_type(tl.int64))
    numbers = ()
    for i in tl.static_range(2):
        first, second = words(tl.load(at + i, mask=mask, other=0))
        numbers += halves(first, dtype) + halves(second, dtype)
    return numbers


@triton.jit
def _four(numbers, mask):
    """Neighbouring float32 of each thread, 0 where the mask is not. By one instruction: what Triton does to find out that it may
    take one for four loads would be a third of the time that compiling the kernel takes."""
    at = numbers.to(tl.int64, bitcast=True)
    return tl.inline_asm_elementwise(
        FOUR, "=f,=f,=f,=f,l,r", [at, mask.to(tl.int32)], dtype=(tl.float32,) * 4, is_pure=False, pack=1
    )


@triton.jit
def _pair(low, high):
    bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def normed(x, weight, own, room, W: tl.constexpr):
    """The RMS norms of x's rows [rows, hidden], to `own`, which only this program reads."""
    THREADS: tl.constexpr = W.threads
    ROWS: tl.constexpr = W.rows
    PASSES: tl.constexpr = W.hidden // (W.threads * 8)
    tl.static_assert(PASSES * W.threads * 8 == W.hidden)
    dtype: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, W.threads) * 8
    known, squares = (), ()
    for row in tl.static_range(ROWS):
        square = tl.zeros((THREADS,), tl.float32)
        for i in tl.static_range(PASSES):
            eight = _eight(x + row * W.hidden + i * W.threads * 8 + column, column >= 0)
            for j in tl.static_range(8):
                square += eight[j] * eight[j]
            known += (eight,)
        squares += (square,)
    sums = block_sums(squares, room, ROWS, W)
    for i in tl.static_range(PASSES):
        factors = ()
        for j in tl.static_range(8):
            factors += (tl.load(weight + i * W.threads * 8 + column + j).to(dtype).to(tl.float32),)
        for row in tl.static_range(ROWS):
            scale = tl.rsqrt(sums[row] / W.hidden + W.eps)
            made = ()
            for j in tl.static_range(8):
                scaled = (known[row * PASSES + i][j] * scale).to(dtype).to(tl.float32)
                made += ((scaled * factors[j]).to(dtype),)
            at = (own + row * W.hidden + i * W.threads * 8 + column).to(tl.pointer_type(tl.int64))
            for j in tl.static_range(2):
                tl.store(at + j, _pair(made[4 * j], made[4 * j + 1]) | (_pair(made[4 * j + 2], made[4 * j + 3]) << 32))
    tl.debug_barrier()


@triton.jit
def share_of_low_rank(x, a, layer, parts, room, L: tl.constexpr, W: tl.constexpr):
    """This program's share of z's summands [rows, slices, ranks], of x [rows, width] and A [layers, ranks, width]."""
    THREADS: tl.constexpr = W.threads
    ROWS: tl.constexpr = W.rows
    PASSES: tl.constexpr = (L.slice + W.threads * 8 - 1) // (W.threads * 8)
    thread = tl.arange(0, W.threads)
    for piece in range(tl.program_id(0), L.pieces, W.programs):
        r, begin = piece % L.ranks, piece // L.ranks * L.slice
        sums = (tl.zeros((THREADS,), tl.float32),) * ROWS
        for i in tl.static_range(PASSES):
            column = (i * W.threads + thread) * 8
            inside = column < L.slice
            factors = _eight(a + (layer * L.ranks + r) * L.width + begin + column, inside)
            new = ()
            for row in tl.static_range(ROWS):
                numbers, total = _eight(x + row * L.width + begin + column, inside), sums[row]
                for j in tl.static_range(8):
                    total += numbers[j] * factors[j]
                new += (total,)
            sums = new
        sums = block_sums(sums, room, ROWS, W)
        for row in tl.static_range(ROWS):
            at = parts + (row * L.slices + piece // L.ranks) * L.ranks + r + thread
            tl.store(at, sums[row], mask=thread == 0)


@triton.jit
def second_factors(b, layer, first_output, wanted, L: tl.constexpr, P: tl.constexpr):
    """Of B [layers, outputs, columns], for a turn's tiles from an output on, those of the warp's own tile, the warp-th, if that
    is `wanted`: for each 16 ranks what a product takes of outputs g and of g+8."""
    GROUPS: tl.constexpr = L.rank // 16
    thread = tl.arange(0, P.threads)
    g, t, warp = thread % 32 // 4, thread % 4, thread // 32
    found = ()
    for k in tl.static_range(GROUPS):
        for half in tl.static_range(2):
            n = first_output + warp * 16 + half * 8 + g
            at = (b + (layer * P.outputs + n) * L.columns + k * 16).to(tl.pointer_type(tl.int64)) + t
            found += (tl.load(at, mask=tl.where(wanted, warp, P.per) < P.per, other=0),)
    return found


@triton.jit
def low_rank(parts, which, dtype: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    """z of one of the group's linears, all summands of it, as a product takes it: for each 16 ranks two words."""
    THREADS: tl.constexpr = P.threads
    GROUPS: tl.constexpr = L.rank // 16
    SLICES: tl.constexpr = L.slices
    thread = tl.arange(0, P.threads)
    g, t = thread % 32 // 4, thread % 4
    row = g // P.run if P.apart else g  # the columns of a product: see of_chunk
    there = row < L.rows
    if P.apart:
        there &= g % P.run == 0
    made = ()
    for k in tl.static_range(GROUPS):
        zero = tl.zeros((THREADS,), tl.float32)
        sums = (zero, zero, zero, zero)
        for i in tl.static_range(SLICES):
            at = parts + (row * L.slices + i) * L.ranks + which * L.rank + k * 16 + t * 4
            four = _four(at, there)
            sums = (sums[0] + four[0], sums[1] + four[1], sums[2] + four[2], sums[3] + four[3])
        low = _pair(sums[0].to(dtype), sums[1].to(dtype))
        made += (low.to(tl.int32), _pair(sums[2].to(dtype), sums[3].to(dtype)).to(tl.int32))
    return made
