"""What memory sends while a program computes: tiles of codes and scales, by Hopper's bulk copies, into a ring in shared memory.

A load into registers holds the load/store unit for each 32 bytes that a group of four lanes reads, as long as its lookups
of levels do; a bulk copy does not touch that unit, and a lane then finds its eight bytes in shared memory, a warp's 256 in two
accesses, since rows are put 32 bytes further apart than they are long. Several tiles are on their way at once, which takes no
registers.

A stage is a tile's share of inputs: 16 rows, a chunk of blocks wide; or those of several tiles, as much narrower, where a
row is not a number of wide chunks. Its slot in the ring has two barriers: `full` counts the bytes that have arrived, `empty` the
warps that have read them. All warps ask for rows of every stage, which takes a warp some sixty cycles a copy: one for all rows
would hold everyone up.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import TABLE_BYTES

SLOT = tl.constexpr(35328)  # bytes that a stage takes at most
RING_BYTES = tl.constexpr(256 * 256 + 1024)  # where the ring begins: past the pairs of levels and the map of scales
BARS_BYTES = tl.constexpr(128)
# bytes of four slots and their barriers past what lane_kernels.py has by itself; triton_call.py reads it from the text below
ROOM = tl.constexpr(RING_BYTES.value + 4 * SLOT.value + BARS_BYTES.value - TABLE_BYTES.value)
BEGUN = tl.constexpr(f"""{{
    // dynamic shared memory: {ROOM.value}
    .reg .pred mine;
    setp.ne.b32 mine, $2, 0;
    @mine mbarrier.init.shared::cta.b64 [$1], $3;
    fence.mbarrier_init.release.cluster;
    fence.proxy.async.shared::cta;
    bar.warp.sync 0xffffffff;
    mov.b32 $0, $1;
}}""")
ASKED = tl.constexpr("""{
    .reg .pred p;
    setp.eq.b32 p, $1, 0;
    @p bra done;
    setp.lt.s32 p, $2, 0;
    @p bra free;
    wait:
    mbarrier.try_wait.parity.shared::cta.b64 p, [$4], $2;
    @!p bra wait;
    free:
    setp.eq.b32 p, $9, 0;
    @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $8;
    bar.warp.sync 0xffffffff;
    setp.lt.u32 p, $9, $10;
    @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$5], [$6], $7, [$3];
    done:
    mov.b32 $0, $1;
}""")
ARRIVED = tl.constexpr("""{
    .reg .pred p;
    wait:
    mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;
    @!p bra wait;
    mov.b32 $0, $1;
}""")
LEFT = tl.constexpr("""{
    .reg .pred p;
    setp.eq.b32 p, $2, 0;
    bar.warp.sync 0xffffffff;
    @p mbarrier.arrive.shared::cta.b64 _, [$1];
    mov.b32 $0, $1;
}""")
TWO = tl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")
ONE = tl.constexpr("ld.shared.b32 $0, [$1];")
HALF = tl.constexpr("{ .reg .b16 h; ld.shared.b16 h, [$1]; mov.b32 $0, {h, h}; }")


@triton.constexpr_function
def pitches(work):
    """Bytes from one row's codes, and from one row's scales, to the next one's, in a slot."""
    return 32 * work.chunk + 32, work.chunk + 16


@triton.constexpr_function
def slot_of(work):
    return 16 * work.tall * sum(pitches(work))


@triton.jit
def begun(ring, W: tl.constexpr):
    """Makes the barriers, full ones, then empty ones; -> where they are."""
    thread = tl.arange(0, W.threads)
    tl.static_assert(W.slots <= 4 and W.slots * 16 <= BARS_BYTES)
    bars = ring + W.slots * SLOT
    tl.inline_asm_elementwise(
        BEGUN,
        "=r,r,r,r",
        [bars + thread * 8, (thread < 2 * W.slots).to(tl.int32), thread * 0 + W.warps],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    return bars


@triton.jit
def sources(codes, scales, W: tl.constexpr):
    """Of a row of 16 whose first one's codes and scales are given, what this thread asks for if it does, and how far the next
    tile's lies from it; a warp's even lanes ask for codes, its odd ones for scales."""
    thread = tl.arange(0, W.threads)
    row, of_codes = _row(W), thread % 2 == 0
    first = tl.where(
        of_codes,
        codes.to(tl.int64, bitcast=True) + row * (W.blocks * 32),
        scales.to(tl.int64, bitcast=True) + row * W.blocks,
    )
    return first, tl.where(of_codes, 16 * W.blocks * 32, 16 * W.blocks).to(tl.int64)


@triton.jit
def _row(W: tl.constexpr):
    EACH: tl.constexpr = 16 * W.tall // W.warps  # rows, of which a warp's lanes ask for one's codes or scales each
    tl.static_assert(EACH * W.warps == 16 * W.tall and EACH <= 16)
    thread = tl.arange(0, W.threads)
    return thread // 32 if EACH == 1 else thread // 32 + thread % 32 // 2 % EACH * W.warps


@triton.jit
def ask(stage, wanted, from_, ring, bars, W: tl.constexpr):
    """Have a stage brought, of rows whose `sources` are given, if it is `wanted`."""
    tl.static_assert(slot_of(W) <= SLOT and W.slots & (W.slots - 1) == 0)
    CODES: tl.constexpr = pitches(W)[0]
    SCALES: tl.constexpr = pitches(W)[1]
    ROWS: tl.constexpr = 16 * W.tall
    EACH: tl.constexpr = ROWS // W.warps
    thread = tl.arange(0, W.threads)
    row, of_codes, slot = _row(W), thread % 2 == 0, stage & (W.slots - 1)
    to = ring + tl.where(of_codes, row * CODES, ROWS * CODES + row * SCALES) + slot * SLOT
    size = tl.where(of_codes, W.chunk * 32, W.chunk)
    # of the slot's use that must be over; none before the first
    before = tl.where(stage < W.slots, -1, (stage // W.slots & 1) ^ 1)
    zero, full = thread * 0, bars + slot * 8
    tl.inline_asm_elementwise(
        ASKED,
        "=r,r,r,r,r,r,l,r,r,r,r",
        [
            wanted.to(tl.int32) + zero,
            before + zero,
            full,
            full + W.slots * 8,
            to,
            from_,
            size,
            zero + W.chunk * 33 * EACH,
            thread % 32,
            zero + 2 * EACH,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def taken(stage, ring, bars, W: tl.constexpr):
    """Of a stage that was asked for, once it is there, for rows g and g+8 of each of its tiles: the lane's two words of codes of
    each block of a run, and a word with their scales. Its slot is free then."""
    RUN: tl.constexpr = W.run
    CODES: tl.constexpr = pitches(W)[0]
    SCALES: tl.constexpr = pitches(W)[1]
    ROWS: tl.constexpr = 16 * W.tall
    WORD: tl.constexpr = ONE if RUN == 4 else HALF
    thread = tl.arange(0, W.threads)
    g, t, warp, slot = thread % 32 // 4, thread % 4, thread // 32, stage & (W.slots - 1)
    full = bars + slot * 8
    parity = (stage // W.slots & 1) + thread * 0
    tl.inline_asm_elementwise(ARRIVED, "=r,r,r", [full, parity], dtype=tl.int32, is_pure=False, pack=1)
    tl.static_assert(RUN == 4 or RUN == 2, "a word of scales, or half of one")
    found = ()
    for half in tl.static_range(2 * W.tall):
        at = ring + slot * SLOT + (g + half * 8) * CODES + warp * (RUN * 32) + t * 8
        for i in tl.static_range(RUN):
            found += tl.inline_asm_elementwise(
                TWO, "=r,=r,r", [at + i * 32], dtype=(tl.int32,) * 2, is_pure=False, pack=1
            )
        at = ring + slot * SLOT + ROWS * CODES + (g + half * 8) * SCALES + warp * RUN
        found += (tl.inline_asm_elementwise(WORD, "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1),)
    empty = bars + (W.slots + slot) * 8
    tl.inline_asm_elementwise(LEFT, "=r,r,r", [empty, thread % 32], dtype=tl.int32, is_pure=False, pack=1)
    return found
