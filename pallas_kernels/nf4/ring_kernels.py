"""What memory sends while a program computes: tiles of codes and scales, by Hopper's bulk copies, into a ring in shared memory.

A load into registers holds the load/store unit for each 32 bytes that a group of four lanes reads, as long as its lookups
of levels do; a bulk copy does not touch that unit, and a lane then finds its eight bytes in shared memory, a warp's 256 in two
accesses, since rows are put 32 bytes further apart than they are long. Several tiles are on their way at once, which takes no
registers.

A stage is a tile's share of inputs: 16 rows, a chunk of blocks wide. Its slot in the ring has two barriers: `full` counts
the bytes that have arrived, `empty` the warps that have read them. Each of 16 warps asks for one row of every stage, which
takes a warp some sixty cycles a copy: one for all rows would hold everyone up.
"""

import triton
import triton.language as tl

ROOM = tl.constexpr(138368)  # bytes, past the tables of lane_kernels.py; triton_call.py reads it from the text below
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
    setp.lt.u32 p, $9, 2;
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


@triton.constexpr_function
def pitches(chunk):
    """Bytes from one row's codes, and from one row's scales, to the next one's, and of a slot; so many blocks wide."""
    return 32 * chunk + 32, chunk + 16, 16 * (33 * chunk + 48)


@triton.jit
def begun(ring, W: tl.constexpr):
    """Makes the barriers, full ones, then empty ones; -> where they are."""
    thread = tl.arange(0, W.threads)
    SIZE: tl.constexpr = W.slots * pitches(W.chunk)[2]
    tl.static_assert(SIZE + W.slots * 16 <= ROOM)
    bars = ring + SIZE
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
def ask(stage, wanted, codes, scales, last, ring, bars, W: tl.constexpr):
    """Have a stage brought, of rows whose first one's codes and scales are given, if it is `wanted`; rows past the `last` one are
    the last one again."""
    tl.static_assert(W.warps == 16, "a row each")
    CODES: tl.constexpr = pitches(W.chunk)[0]
    SCALES: tl.constexpr = pitches(W.chunk)[1]
    SLOT: tl.constexpr = pitches(W.chunk)[2]
    thread = tl.arange(0, W.threads)
    lane, row, slot, round_ = thread % 32, thread // 32, stage % W.slots, stage // W.slots
    from_row = tl.minimum(row, last)
    of_codes = lane == 0  # the next lane asks for scales
    from_ = tl.where(
        of_codes,
        codes.to(tl.int64, bitcast=True) + from_row * (W.blocks * 32),
        scales.to(tl.int64, bitcast=True) + from_row * W.blocks,
    )
    to = ring + slot * SLOT + tl.where(of_codes, row * CODES, 16 * CODES + row * SCALES)
    size = tl.where(of_codes, W.chunk * 32, W.chunk)
    before = tl.where(round_ == 0, -1, (round_ - 1) % 2)  # of the slot's use that must be over; none before the first
    zero, full = thread * 0, bars + slot * 8
    tl.inline_asm_elementwise(
        ASKED,
        "=r,r,r,r,r,r,l,r,r,r",
        [
            wanted.to(tl.int32) + zero,
            before + zero,
            full,
            full + W.slots * 8,
            to,
            from_,
            size,
            zero + W.chunk * 33,
            lane,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def taken(stage, ring, bars, W: tl.constexpr):
    """Of a stage that was asked for, once it is there: for rows g and g+8 the lane's two words of codes of each block of a
    run, and a word with their scales. Its slot is free then."""
    RUN: tl.constexpr = W.run
    CODES: tl.constexpr = pitches(W.chunk)[0]
    SCALES: tl.constexpr = pitches(W.chunk)[1]
    SLOT: tl.constexpr = pitches(W.chunk)[2]
    thread = tl.arange(0, W.threads)
    g, t, warp, slot = thread % 32 // 4, thread % 4, thread // 32, stage % W.slots
    full = bars + slot * 8
    parity = stage // W.slots % 2 + thread * 0
    tl.inline_asm_elementwise(ARRIVED, "=r,r,r", [full, parity], dtype=tl.int32, is_pure=False, pack=1)
    tl.static_assert(RUN == 4, "a word of scales")
    found = ()
    for half in tl.static_range(2):
        at = ring + slot * SLOT + (g + half * 8) * CODES + warp * (RUN * 32) + t * 8
        for i in tl.static_range(RUN):
            found += tl.inline_asm_elementwise(
                TWO, "=r,=r,r", [at + i * 32], dtype=(tl.int32,) * 2, is_pure=False, pack=1
            )
        at = ring + slot * SLOT + 16 * CODES + (g + half * 8) * SCALES + warp * RUN
        found += (tl.inline_asm_elementwise(ONE, "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1),)
    empty = bars + (W.slots + slot) * 8
    tl.inline_asm_elementwise(LEFT, "=r,r,r", [empty, thread % 32], dtype=tl.int32, is_pure=False, pack=1)
    return found
