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

from dataclasses import replace

import triton
import triton.language as tl

from pallas_kernels.nf4.grouped_work import Work
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
from pallas_kernels.nf4.tile_kernels import (
    asked,
    fetched,
    height_of,
    loaded,
    number_of,
    of_chunk,
    of_weight,
    scales_of,
    start_of,
    words,
)


@triton.jit
def _stored(
    total, residual, out, table, tile, START: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr
):
    """COUNT of a turn's products (see product_added) from START on, one a group and tile of which the first is `tile`, summed
    over warps and stored: PARTS numbers of a lane's each.

    Sums meet in shared memory, where neighbouring lanes write and read neighbouring words, which Triton's own do not.
    """
    THREADS: tl.constexpr = W.threads
    WARPS: tl.constexpr = W.warps
    NUMBERS: tl.constexpr = COUNT * PARTS
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    y = tl.zeros((THREADS,), tl.float32)
    if W.ptx:
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
            number = tl.reshape(tl.broadcast_to(number[None, :], (WARPS, 32)), (THREADS,))
            y = tl.where(warp == i, number, y)
    product, part = START + warp // PARTS, warp % PARTS * (4 // PARTS)
    tile += product // W.groups
    start = start_of(tile, W)
    end, own = start + height_of(tile, W), number_of(tile, W)
    m = product % W.groups * 8 + lane % 4 * 2 + part % 2
    n = start + own * 16 + lane // 4 + part // 2 * 8
    mask = (m < W.rows) & (n < end) & (warp < NUMBERS)
    if W.residual:
        y += tl.load(residual + m * W.outputs + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m * W.outputs + n, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turn_stored(total, residual, out, table, tile, W: tl.constexpr):
    """All products of a turn, as many at a time as have room and warps."""
    PARTS: tl.constexpr = 2 if W.rows == 1 else 4  # with one row of x, the odd columns of its group are empty
    COUNT: tl.constexpr = W.per * W.groups
    ROOM: tl.constexpr = min(SUMS_ROOM // (W.warps * 128 * PARTS), W.warps // PARTS)
    for start in tl.static_range(0, COUNT, ROOM):
        _stored(total, residual, out, table, tile, start, min(ROOM, COUNT - start), PARTS, W)


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
    W: tl.constexpr,
):
    """out [rows, outputs] = x [W_0; W_1; W_2]^T + z_i B_i + residual, of one layer of stacks. W: see Work.

    z [rows, lora_weights * rank] holds a rank's numbers for each weight, B is [L, outputs, rank], of the dtype of x.
    """
    THREADS: tl.constexpr = W.threads
    RUN: tl.constexpr = W.run
    GROUPS: tl.constexpr = W.groups
    PER: tl.constexpr = W.per
    dtype: tl.constexpr = x.dtype.element_ty
    LOWER: tl.constexpr = 2 * RUN + W.scale_values  # words of codes and scales of the upper half
    thread = tl.arange(0, THREADS)
    layer = tl.load(layers).to(tl.int64)
    codes, scales, nested = (codes_0, codes_1, codes_2), (scales_0, scales_1, scales_2), (nested_0, nested_1, nested_2)
    turns = (W.turns - tl.program_id(0) + W.programs - 1) // W.programs * W.chunks
    offsets = (0.0, 0.0, 0.0)
    if W.double_quant:
        offsets = (tl.load(offset_0 + layer), tl.load(offset_1 + layer), tl.load(offset_2 + layer))
    start = layer.to(tl.int32) * 0
    if W.ptx:
        start = place()
    if W.bulk:
        ring = start + TABLE_BYTES
        bars = begun(ring, W)
        for stage in tl.static_range(W.slots - 1):
            first_turn = tl.program_id(0) * 0 + stage // PER
            asked(first_turn, turns, stage % PER, codes, scales, layer, ring, bars, W)
    ahead = fetched(tl.program_id(0) * 0, turns, 0, codes, scales, nested, z, b, layer, W)
    table = tl.zeros((THREADS,), tl.int32)
    if W.ptx:
        table = tables(start, nested_map, dtype, W.double_quant, THREADS)
    copy = table + thread % 32 * 4
    zero = tl.zeros((THREADS,), tl.float32)
    zeros = (zero, zero, zero, zero)
    total = (zeros,) * (PER * GROUPS)
    whole = ()
    if W.chunks == 1:
        whole = of_chunk(x, 0, W)
    for turn in range(turns):
        first_tile, chunk = (tl.program_id(0) + turn // W.chunks * W.programs) * PER, turn % W.chunks
        pairs = whole if W.chunks == 1 else of_chunk(x, chunk, W)
        sums = ()
        for item in tl.static_range(PER):
            now = ahead
            next_turn, next_item = turn + (item + 1) // PER, (item + 1) % PER
            ahead = fetched(next_turn, turns, next_item, codes, scales, nested, z, b, layer, W)
            if W.bulk:
                last_turn, last_item = turn + (item + W.slots - 1) // PER, (item + W.slots - 1) % PER
                asked(last_turn, turns, last_item, codes, scales, layer, ring, bars, W)
            if W.ptx:
                loads_stay_above(thread)
            if W.bulk:
                found = taken(turn * PER + item, ring, bars, W)
            else:
                found = loaded(now, W)
            offset = of_weight(offsets[0], offsets[1], offsets[2], first_tile, W)
            above, below = 0.0, 0.0  # of their cells
            if W.double_quant:
                above, below = now[W.loaded_values], now[W.half + W.loaded_values]
            upper = scales_of(found, 2 * RUN, above, table, nested_map, offset, W)
            lower = scales_of(found, LOWER + 2 * RUN, below, table, nested_map, offset, W)
            own = ()
            for group in tl.static_range(GROUPS):
                s = total[item * GROUPS + group]
                if W.rank > 0:
                    u0, u1 = words(now[W.half - 1])
                    v0, v1 = words(now[2 * W.half - 1])
                    z0, z1 = words(now[2 * W.half + group])
                    s = product_added((u0, v0, u1, v1), z0, z1, s, dtype, W.warps, W.ptx)
                own += (s,)
            for i in tl.static_range(RUN):
                u, v = (), ()
                for j in tl.static_range(2):
                    u += pairs_of(found[2 * i + j], copy, levels, dtype, W.ptx)
                    v += pairs_of(found[LOWER + 2 * i + j], copy, levels, dtype, W.ptx)
                new = ()
                for group in tl.static_range(GROUPS):
                    b_pairs = pairs[group * RUN + i]
                    d = zeros
                    for j in tl.static_range(4):
                        a = (u[2 * j], v[2 * j], u[2 * j + 1], v[2 * j + 1])
                        d = product_added(a, b_pairs[2 * j], b_pairs[2 * j + 1], d, dtype, W.warps, W.ptx)
                    s, su, sl = own[group], upper[i], lower[i]
                    new += ((s[0] + d[0] * su, s[1] + d[1] * su, s[2] + d[2] * sl, s[3] + d[3] * sl),)
                own = new
            sums += own
        if chunk == W.chunks - 1:
            _turn_stored(sums, residual, out, table, first_tile, W)
            sums = (zeros,) * (PER * GROUPS)
        total = sums


def compile_cases():
    """What tests compile for every supported architecture."""
    arrays = {"levels": "*fp32", "nested_map": "*fp32", "layers": "*i32"}
    for i in range(3):
        arrays |= {f"codes_{i}": "*u8", f"scales_{i}": "*u8", f"nested_{i}": "*fp32", f"offset_{i}": "*fp32"}
    arrays |= dict.fromkeys(("x", "z", "b", "residual", "out"), "*bf16")
    work = Work(
        rows=16,
        heights=(4096, 1024, 1024),
        blocks=64,
        double_quant=True,
        nested_heights=(1024, 256, 256),
        nested_columns=1,
        cell=(4, 64),
        rank=16,
        lora_weights=3,
        residual=True,
        run=4,
        per=2,
        warps=16,
        programs=128,
        slots=0,
    )
    options = {"num_warps": 16, "num_stages": 1}
    yield linears_kernel, arrays, {"W": work}, options
    yield linears_kernel, arrays, {"W": replace(work, rows=8, slots=4)}, options | {"oldest": 90}
