"""How the programs of one launch wait for each other, and how the threads of one add up.

Programs count in numbers in memory, which are zero before the launch. All must run at the same time: there may be no more of
them than multiprocessors.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import got, put

ARRIVED = tl.constexpr("""{
    .reg .pred p;
    setp.eq.b32 p, $2, 0;
    @p red.release.gpu.global.add.u32 [$1], 1;
    mov.b32 $0, $2;
}""")
ALL_THERE = tl.constexpr("""{
    .reg .pred p;
    .reg .b32 there;
    setp.ne.b32 p, $2, 0;
    @p bra done;
    wait:
    ld.acquire.gpu.global.u32 there, [$1];
    setp.lt.u32 p, there, $3;
    @p bra wait;
    done:
    mov.b32 $0, $2;
}""")
SUM_OF_WARP = tl.constexpr(
    "{ .reg .f32 other;\nmov.f32 $0, $1;\n"
    + "".join(
        f"shfl.sync.bfly.b32 other, $0, {distance}, 31, 0xffffffff; add.f32 $0, $0, other;\n"
        for distance in (16, 8, 4, 2, 1)
    )
    + "}"
)


@triton.jit
def arrive(counter, W: tl.constexpr):
    """All that this program has written is there for those that wait for it."""
    thread = tl.arange(0, W.threads)
    tl.debug_barrier()
    at = counter.to(tl.int64, bitcast=True) + thread * 0
    tl.inline_asm_elementwise(ARRIVED, "=r,l,r", [at, thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(counter, W: tl.constexpr):
    """Until all programs have arrived."""
    thread = tl.arange(0, W.threads)
    at = counter.to(tl.int64, bitcast=True) + thread * 0
    everyone = thread * 0 + W.programs
    tl.inline_asm_elementwise(ALL_THERE, "=r,l,r,r", [at, thread, everyone], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def block_sums(values, room, COUNT: tl.constexpr, W: tl.constexpr):
    """Of each of COUNT tensors with an element a thread the sum of all, for every thread."""
    THREADS: tl.constexpr = W.threads
    WARPS: tl.constexpr = W.o.warps
    warp = tl.arange(0, THREADS) // 32
    tl.debug_barrier()  # what the room held has been read
    for i in tl.static_range(COUNT):
        own = tl.inline_asm_elementwise(SUM_OF_WARP, "=f,f", [values[i]], dtype=tl.float32, is_pure=False, pack=1)
        put(room + i * W.o.pitch + warp * 4, own)
    tl.debug_barrier()
    sums = ()
    for i in tl.static_range(COUNT):
        total = tl.zeros((THREADS,), tl.float32)
        for j in tl.static_range(WARPS):
            total += got(room + i * W.o.pitch + j * 4 + warp * 0)
        sums += (total,)
    return sums
