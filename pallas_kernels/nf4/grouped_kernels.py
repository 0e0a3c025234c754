"""The Triton kernel of `linears`: up to three packed weights over one x, LoRA's second factor and a residual, one launch.

What a launch costs beside its bytes is waiting: for the index of the layer, for the first codes to arrive from memory, for
the table of levels to be written. So a program is the only one of its multiprocessor, and stays:

* Outputs are cut into tiles of 16, those of all weights in one row of them; a program takes PER neighbouring ones at a turn,
  then PER others. Its warps share out the inputs, RUN neighbouring blocks each at a time; a warp keeps its part of x in
  registers for all tiles of a turn, and warps meet once a turn to add up what they have.
* Codes and scales of the next tile are asked for before those that are there are multiplied, the first before the table
  is made: memory is never left idle, and nothing is waited for that was not asked for a tile ago. On Hopper they come
  in bulk into shared memory, three tiles ahead (ring_kernels.py), where the shapes allow it.
* A byte of codes is looked up, not computed: a table of 256 words holds its two levels as the pair of 16-bit numbers
  that tensor cores take. It lies in shared memory once for each of the 32 lanes, one lane's copy in one bank, so that a
  warp's lookups never wait for each other. That is a selection, an address and a load for two weights, each on a unit of
  its own, where selecting levels in registers takes 23 instructions for eight, all on one that is half as fast.
* Tensor cores multiply and add, for one row of x as for eight: 16 outputs by 16 inputs by 8 rows in one instruction.
* Levels are never moved between lanes. Which input stands where in a product is free as long as weights and x agree, so
  a lane (g, t) = (lane / 4, lane % 4), which supplies outputs g and g+8, reads the bytes 8t..8t+7 of a block, and
  the byte's low and high nibble (inputs 8t+i and 8t+i+32) are the two neighbours in a register. x is woven likewise.
* LoRA's z B is a product of 16 more inputs: ranks instead of x, B's numbers as they are instead of levels.

tile_kernels.py holds what a tile reads, lane_kernels.py what is done lane by lane.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import (
    SUMS_BYTES,
    SUMS_ROOM,
    TABLE_BYTES,
    got,
    loads_stay_above,
    pairs_of,
    place,
    product_added,
    put,
    settled,
    tables,
)
from pallas_kernels.nf4.ring_kernels import begun, taken
from pallas_kernels.nf4.tile_kernels import asked, fetched, loaded, of_chunk, of_weight, scales_of, words


@triton.jit
def _stored(
    total,
    residual,
    out,
    table,
    tile,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
):
    """COUNT of a turn's products (see product_added) from START on, one a group and tile of which the first is `tile`, summed
    over warps and stored.

    Sums meet in shared memory, where neighbouring lanes write and read neighbouring words, which Triton's own do not.
    """
    PARTS: tl.constexpr = 2 if M == 1 else 4  # with one row of x, the odd columns of its group are empty
    GROUPS: tl.constexpr = (M + 7) // 8
    OUT: tl.constexpr = N_0 + N_1 + N_2
    TILES_0: tl.constexpr = (N_0 + 15) // 16
    TILES_1: tl.constexpr = (N_1 + 15) // 16
    NUMBERS: tl.constexpr = COUNT * PARTS
    thread = tl.arange(0, WARPS * 32)
    lane, warp = thread % 32, thread // 32
    y = tl.zeros((WARPS * 32,), tl.float32)
    if PTX:
        known = ()
        for i in tl.static_range(NUMBERS):
            known += (settled(total[START + i // PARTS][i % PARTS * (4 // PARTS)]),)
        tl.debug_barrier()  # the sums before these have been read
        for i in tl.static_range(NUMBERS):
            put(table + SUMS_BYTES + ((i * WARPS + warp) * 32 + lane) * 4, known[i])
        tl.debug_barrier()
        for i in tl.static_range(WARPS):
            y += got(table + SUMS_BYTES + ((tl.minimum(warp, NUMBERS - 1) * WARPS + i) * 32 + lane) * 4)
    else:
        for i in tl.static_range(NUMBERS):
            number = tl.sum(tl.reshape(total[START + i // PARTS][i % PARTS * (4 // PARTS)], (WARPS, 32)), axis=0)
            number = tl.reshape(tl.broadcast_to(number[None, :], (WARPS, 32)), (WARPS * 32,))
            y = tl.where(warp == i, number, y)
    product, part = START + warp // PARTS, warp % PARTS * (4 // PARTS)
    tile += product // GROUPS
    start = of_weight(0, N_0, N_0 + N_1, tile, TILES_0, TILES_1)
    end = start + of_weight(N_0, N_1, N_2, tile, TILES_0, TILES_1)
    own = tile - of_weight(0, TILES_0, TILES_0 + TILES_1, tile, TILES_0, TILES_1)
    m = product % GROUPS * 8 + lane % 4 * 2 + part % 2
    n = start + own * 16 + lane // 4 + part // 2 * 8
    mask = (m < M) & (n < end) & (warp < NUMBERS)
    if RESIDUAL:
        y += tl.load(residual + m * OUT + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m * OUT + n, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turn_stored(
    total,
    residual,
    out,
    table,
    tile,
    PER: tl.constexpr,
    M: tl.constexpr,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
):
    """All products of a turn, as many at a time as have room and warps."""
    PARTS: tl.constexpr = 2 if M == 1 else 4
    COUNT: tl.constexpr = PER * ((M + 7) // 8)
    ROOM: tl.constexpr = min(SUMS_ROOM // (WARPS * 128 * PARTS), WARPS // PARTS)
    for start in tl.static_range(0, COUNT, ROOM):
        _stored(
            total, residual, out, table, tile, start, min(ROOM, COUNT - start), M, N_0, N_1, N_2, RESIDUAL, WARPS, PTX
        )


@triton.jit
def linears_kernel(
    x,
    codes_0,
    scales_0,
    nested_0,
    offset_0,
    codes_1,
    scales_1,
    nested_1,
    offset_1,
    codes_2,
    scales_2,
    nested_2,
    offset_2,
    levels,
    nested_map,
    layers,
    z,
    b,
    residual,
    out,
    M: tl.constexpr,
    WEIGHTS: tl.constexpr,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    NESTED_0: tl.constexpr,
    NESTED_1: tl.constexpr,
    NESTED_2: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    NESTED_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RUN: tl.constexpr,
    PER: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """out [M, N_0 + N_1 + N_2] = x [W_0; W_1; W_2]^T + z_i B_i + residual, of one layer of stacks; M up to 16.

    z [M, WEIGHTS RANK] holds RANK numbers for each weight, B is [L, N_0 + N_1 + N_2, RANK], of the dtype of x.
    With SLOTS codes and scales come in bulk, into a ring of so many stages; 0: they are loaded.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    GROUPS: tl.constexpr = (M + 7) // 8  # of rows of x
    CHUNKS: tl.constexpr = (SCALE_COLUMNS + RUN * WARPS - 1) // (RUN * WARPS)
    TILES_0: tl.constexpr = (N_0 + 15) // 16
    TILES_1: tl.constexpr = (N_1 + 15) // 16
    TILES: tl.constexpr = TILES_0 + TILES_1 + (N_2 + 15) // 16
    TURNS: tl.constexpr = (TILES + PER - 1) // PER  # of all programs, each CHUNKS times
    BULK: tl.constexpr = SLOTS > 0 and PTX
    SCALES: tl.constexpr = 1 if DOUBLE else RUN  # values with the scales of RUN blocks
    LOWER: tl.constexpr = 2 * RUN + SCALES  # words of codes and scales of the upper half
    BEFORE: tl.constexpr = 0 if BULK else RUN + SCALES  # values of a half, of which then come its cell's and LoRA's
    HALF: tl.constexpr = BEFORE + (1 if DOUBLE else 0) + (1 if RANK > 0 else 0)
    thread = tl.arange(0, WARPS * 32)
    layer = tl.load(layers).to(tl.int64)
    codes, scales, nested = (codes_0, codes_1, codes_2), (scales_0, scales_1, scales_2), (nested_0, nested_1, nested_2)
    turns = (TURNS - tl.program_id(0) + PROGRAMS - 1) // PROGRAMS * CHUNKS
    offsets = (0.0, 0.0, 0.0)
    if DOUBLE:
        offsets = (tl.load(offset_0 + layer), tl.load(offset_1 + layer), tl.load(offset_2 + layer))
    start = layer.to(tl.int32) * 0
    if PTX:
        start = place()
    if BULK:
        ring = start + TABLE_BYTES
        bars = begun(ring, SLOTS, RUN * WARPS, WARPS)
        for stage in tl.static_range(SLOTS - 1):
            asked(
                tl.program_id(0) * 0 + stage // PER,
                turns,
                stage % PER,
                codes,
                scales,
                layer,
                ring,
                bars,
                N_0,
                N_1,
                N_2,
                SCALE_COLUMNS,
                RUN,
                CHUNKS,
                PER,
                WARPS,
                PROGRAMS,
                SLOTS,
            )
    ahead = fetched(
        tl.program_id(0) * 0,
        turns,
        0,
        codes,
        scales,
        nested,
        z,
        b,
        layer,
        M,
        WEIGHTS,
        N_0,
        N_1,
        N_2,
        NESTED_0,
        NESTED_1,
        NESTED_2,
        SCALE_COLUMNS,
        DOUBLE,
        CELL_ROWS,
        CELL_COLUMNS,
        NESTED_COLUMNS,
        RANK,
        RUN,
        CHUNKS,
        PER,
        WARPS,
        PROGRAMS,
        BULK,
    )
    table = tl.zeros((WARPS * 32,), tl.int32)
    if PTX:
        table = tables(start, nested_map, dtype, DOUBLE, WARPS * 32)
    copy = table + thread % 32 * 4
    zero = tl.zeros((WARPS * 32,), tl.float32)
    zeros = (zero, zero, zero, zero)
    total = (zeros,) * (PER * GROUPS)
    whole = ()
    if CHUNKS == 1:
        whole = of_chunk(x, 0, M, SCALE_COLUMNS, RUN, WARPS)
    for turn in range(turns):
        first_tile, chunk = (tl.program_id(0) + turn // CHUNKS * PROGRAMS) * PER, turn % CHUNKS
        pairs = whole if CHUNKS == 1 else of_chunk(x, chunk, M, SCALE_COLUMNS, RUN, WARPS)
        sums = ()
        for item in tl.static_range(PER):
            now = ahead
            ahead = fetched(
                turn + (item + 1) // PER,
                turns,
                (item + 1) % PER,
                codes,
                scales,
                nested,
                z,
                b,
                layer,
                M,
                WEIGHTS,
                N_0,
                N_1,
                N_2,
                NESTED_0,
                NESTED_1,
                NESTED_2,
                SCALE_COLUMNS,
                DOUBLE,
                CELL_ROWS,
                CELL_COLUMNS,
                NESTED_COLUMNS,
                RANK,
                RUN,
                CHUNKS,
                PER,
                WARPS,
                PROGRAMS,
                BULK,
            )
            if BULK:
                asked(
                    turn + (item + SLOTS - 1) // PER,
                    turns,
                    (item + SLOTS - 1) % PER,
                    codes,
                    scales,
                    layer,
                    ring,
                    bars,
                    N_0,
                    N_1,
                    N_2,
                    SCALE_COLUMNS,
                    RUN,
                    CHUNKS,
                    PER,
                    WARPS,
                    PROGRAMS,
                    SLOTS,
                )
            if PTX:
                loads_stay_above(thread)
            if BULK:
                found = taken(turn * PER + item, ring, bars, RUN, SLOTS, RUN * WARPS, WARPS)
            else:
                found = loaded(now, HALF, RUN, SCALES)
            offset = of_weight(offsets[0], offsets[1], offsets[2], first_tile, TILES_0, TILES_1)
            above, below = (now[BEFORE], now[HALF + BEFORE]) if DOUBLE else (0.0, 0.0)  # of their cells
            upper = scales_of(found, 2 * RUN, above, table, nested_map, offset, DOUBLE, RUN, PTX)
            lower = scales_of(found, LOWER + 2 * RUN, below, table, nested_map, offset, DOUBLE, RUN, PTX)
            own = ()
            for group in tl.static_range(GROUPS):
                s = total[item * GROUPS + group]
                if RANK > 0:
                    u0, u1 = words(now[HALF - 1])
                    v0, v1 = words(now[2 * HALF - 1])
                    z0, z1 = words(now[2 * HALF + group])
                    s = product_added((u0, v0, u1, v1), z0, z1, s, dtype, WARPS, PTX)
                own += (s,)
            for i in tl.static_range(RUN):
                u, v = (), ()
                for j in tl.static_range(2):
                    u += pairs_of(found[2 * i + j], copy, levels, dtype, PTX)
                    v += pairs_of(found[LOWER + 2 * i + j], copy, levels, dtype, PTX)
                new = ()
                for group in tl.static_range(GROUPS):
                    b_pairs = pairs[group * RUN + i]
                    d = zeros
                    for j in tl.static_range(4):
                        a = (u[2 * j], v[2 * j], u[2 * j + 1], v[2 * j + 1])
                        d = product_added(a, b_pairs[2 * j], b_pairs[2 * j + 1], d, dtype, WARPS, PTX)
                    s, su, sl = own[group], upper[i], lower[i]
                    new += ((s[0] + d[0] * su, s[1] + d[1] * su, s[2] + d[2] * sl, s[3] + d[3] * sl),)
                own = new
            sums += own
        if chunk == CHUNKS - 1:
            _turn_stored(sums, residual, out, table, first_tile, PER, M, N_0, N_1, N_2, RESIDUAL, WARPS, PTX)
            sums = (zeros,) * (PER * GROUPS)
        total = sums


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"levels": "*fp32", "nested_map": "*fp32", "layers": "*i32"}
    for i in range(3):
        arrays |= {f"codes_{i}": "*u8", f"scales_{i}": "*u8", f"nested_{i}": "*fp32", f"offset_{i}": "*fp32"}
    rest = {"N_0": 4096, "N_1": 1024, "N_2": 1024, "NESTED_0": 1024, "NESTED_1": 256, "NESTED_2": 256, "DOUBLE": True}
    rest |= {"SCALE_COLUMNS": 64, "CELL_ROWS": 4, "CELL_COLUMNS": 64, "NESTED_COLUMNS": 1, "RANK": 16, "RUN": 4}
    rest |= {"WEIGHTS": 3, "PER": 2, "WARPS": 16, "PROGRAMS": 128, "PTX": True, "RESIDUAL": True}
    own = dict.fromkeys(("x", "z", "b", "residual", "out"), "*bf16")
    options = {"num_warps": 16, "num_stages": 1}
    yield linears_kernel, arrays | own, rest | {"M": 16, "SLOTS": 0}, options
    yield linears_kernel, arrays | own, rest | {"M": 8, "SLOTS": 4}, options | {"oldest": 90}
