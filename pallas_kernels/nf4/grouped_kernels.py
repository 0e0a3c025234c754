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
    got,
    loads_stay_above,
    pairs_of,
    place,
    product_added,
    put,
    settled,
    tables,
)
from pallas_kernels.nf4.ring_kernels import RING_BYTES, ask, begun, taken
from pallas_kernels.nf4.tile_kernels import (
    fetched,
    first_asked,
    height_of,
    loaded,
    number_of,
    of_chunk,
    of_weight,
    own_scales,
    scales_of,
    start_of,
    turn_sources,
    turns_here,
    words,
)


@triton.jit
def summed(total, room, START: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr):
    """COUNT of a turn's products (see product_added) from START on, one a group and tile, PARTS numbers of a lane's each,
    summed over warps; where each stands, `places` says.

    Sums meet in shared memory, in `room`, where neighbouring lanes write and read neighbouring words, which Triton's own do not.
    """
    THREADS: tl.constexpr = W.threads
    WARPS: tl.constexpr = W.warps
    NUMBERS: tl.constexpr = COUNT * PARTS
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    y = tl.zeros((THREADS,), tl.float32)
    known = ()
    for i in tl.static_range(NUMBERS):
        four = total[START + i // PARTS]
        if W.apart:
            known += (four[i % 2 * 2] + four[i % 2 * 2 + 1],)
        else:
            known += (four[i % 4],)
    if W.ptx:
        stays = ()
        for i in tl.static_range(NUMBERS):
            stays += (settled(known[i]),)
        tl.debug_barrier()  # the sums before these have been read
        for i in tl.static_range(NUMBERS):
            put(room + (i * WARPS + warp) * W.pitch + lane * 4, stays[i])
        tl.debug_barrier()
        for i in tl.static_range(WARPS):
            y += got(room + (tl.minimum(warp, NUMBERS - 1) * WARPS + i) * W.pitch + lane * 4)
            if W.apart and W.run == 4:
                y += got(room + (tl.minimum(warp, NUMBERS - 1) * WARPS + i) * W.pitch + (lane ^ 1) * 4)
    else:
        for i in tl.static_range(NUMBERS):
            number = tl.sum(tl.reshape(known[i], (WARPS, 32)), axis=0)
            if W.apart and W.run == 4:
                pairs = tl.sum(tl.reshape(number, (16, 2)), axis=1)
                number = tl.reshape(tl.broadcast_to(pairs[:, None], (16, 2)), (32,))
            number = tl.reshape(tl.broadcast_to(number[None, :], (WARPS, 32)), (THREADS,))
            y = tl.where(warp == i, number, y)
    return y


@triton.jit
def places(tile, START: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr):
    """The row and output of each of `summed`'s numbers, and whether it is one. `tile`: the turn's first."""
    thread = tl.arange(0, W.threads)
    lane, warp = thread % 32, thread // 32
    product, part = START + warp // PARTS, warp % PARTS
    tile += product // W.groups
    start = start_of(tile, W)
    end, own = start + height_of(tile, W), number_of(tile, W)
    there, half, m = warp < COUNT * PARTS, part // 2, product % W.groups * 8 + lane % 4 * 2 + part % 2
    if W.apart:  # a lane has two columns, and a row of x as many as a run has blocks
        half, m = part, lane % 4 * 2 // W.run
        there &= lane % 4 * 2 % W.run == 0
    n = start + own * 16 + lane // 4 + half * 8
    return m, n, (m < W.rows) & (n < end) & there


@triton.jit
def _turn_stored(total, residual, out, room, tile, W: tl.constexpr):
    """All products of a turn, as many at a time as have room and warps."""
    COUNT: tl.constexpr = W.per * W.groups
    ONCE: tl.constexpr = W.summed_at_once
    for start in tl.static_range(0, COUNT, ONCE):
        y = summed(total, room, start, min(ONCE, COUNT - start), W.parts, W)
        m, n, mask = places(tile, start, min(ONCE, COUNT - start), W.parts, W)
        if W.residual:
            y += tl.load(residual + m * W.outputs + n, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + m * W.outputs + n, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def fetched_stage(turn, turns, STAGE: tl.constexpr, codes, scales, nested, z, b, layer, W: tl.constexpr):
    """`fetched` of each tile of a stage."""
    TALL: tl.constexpr = W.tall
    found = ()
    for i in tl.static_range(TALL):
        found += fetched(turn, turns, STAGE * TALL + i, codes, scales, nested, z, b, layer, W)
    return found


@triton.jit
def _tile_added(
    own,
    arrived,
    now,
    OF_STAGE: tl.constexpr,
    pairs,
    offset,
    levels,
    nested_map,
    table,
    dtype: tl.constexpr,
    W: tl.constexpr,
):
    """`own`, the sums of a stage's OF_STAGE-th tile, with its products."""
    THREADS: tl.constexpr = W.threads
    RUN: tl.constexpr = W.run
    GROUPS: tl.constexpr = W.groups
    LOWER: tl.constexpr = 2 * RUN + W.scale_values  # words of codes and scales of the upper half
    AT: tl.constexpr = OF_STAGE * W.fetched_values
    FIRST: tl.constexpr = OF_STAGE * W.found_values if W.bulk else 0
    zero = tl.zeros((THREADS,), tl.float32)
    zeros = (zero, zero, zero, zero)
    found = arrived if W.bulk else loaded(now, AT, W)
    above, below = 0.0, 0.0  # of their cells
    if W.double_quant:
        above, below = now[AT + W.loaded_values], now[AT + W.half + W.loaded_values]
    if W.apart:
        upper = own_scales(found, FIRST + 2 * RUN, above, table, nested_map, offset, W)
        lower = own_scales(found, FIRST + LOWER + 2 * RUN, below, table, nested_map, offset, W)
    else:
        upper = scales_of(found, FIRST + 2 * RUN, above, table, nested_map, offset, W)
        lower = scales_of(found, FIRST + LOWER + 2 * RUN, below, table, nested_map, offset, W)
    if W.rank > 0:
        u0, u1 = words(now[AT + W.half - 1])
        v0, v1 = words(now[AT + 2 * W.half - 1])
        new = ()
        for group in tl.static_range(GROUPS):
            z0, z1 = words(now[AT + 2 * W.half + group])
            new += (product_added((u0, v0, u1, v1), z0, z1, own[group], dtype, W.warps, W.ptx),)
        own = new
    d = zeros
    for i in tl.static_range(RUN):
        u, v = (), ()
        for j in tl.static_range(2):
            u += pairs_of(found[FIRST + 2 * i + j], table, levels, dtype, W.pitch, W.ptx)
            v += pairs_of(found[FIRST + LOWER + 2 * i + j], table, levels, dtype, W.pitch, W.ptx)
        new = ()
        for group in tl.static_range(GROUPS):
            b_pairs, s = pairs[group * RUN + i], own[group]
            if not W.apart:
                d = zeros
            for j in tl.static_range(4):
                a = (u[2 * j], v[2 * j], u[2 * j + 1], v[2 * j + 1])
                d = product_added(a, b_pairs[2 * j], b_pairs[2 * j + 1], d, dtype, W.warps, W.ptx)
            if not W.apart:
                su, sl = upper[i], lower[i]
                s = (s[0] + d[0] * su, s[1] + d[1] * su, s[2] + d[2] * sl, s[3] + d[3] * sl)
            new += (s,)
        own = new
    if W.apart:
        s = own[0]
        own = ((s[0] + d[0] * upper[0], s[1] + d[1] * upper[1], s[2] + d[2] * lower[0], s[3] + d[3] * lower[1]),)
    return own


@triton.jit
def turn_added(
    total,
    ahead,
    turn,
    turns,
    before,
    pairs,
    codes,
    scales,
    nested,
    offsets,
    z,
    b,
    layer,
    levels,
    nested_map,
    table,
    ring,
    bars,
    dtype: tl.constexpr,
    W: tl.constexpr,
):
    """`total`, of each tile and group of a turn, with its products; and what is fetched `ahead` then, of the next turn's first
    stage. `pairs`: the chunk's part of x."""
    STAGES: tl.constexpr = W.stages
    TALL: tl.constexpr = W.tall
    GROUPS: tl.constexpr = W.groups
    thread = tl.arange(0, W.threads)
    first_tile = (tl.program_id(0) + turn // W.chunks * W.programs) * W.per
    offset = of_weight(offsets[0], offsets[1], offsets[2], first_tile, W)
    sums = ()
    LAST: tl.constexpr = W.slots - 1
    for stage in tl.static_range(STAGES):
        now = ahead
        next_turn, next_stage = turn + (stage + 1) // STAGES, (stage + 1) % STAGES
        ahead = fetched_stage(next_turn, turns, next_stage, codes, scales, nested, z, b, layer, W)
        if W.bulk:
            last_turn = turn + (stage + LAST) // STAGES
            if stage == 0 or (stage + LAST) % STAGES == 0:
                source, step = turn_sources(last_turn, codes, scales, layer, W)
            to_come = before + turn * STAGES + stage + LAST
            ask(to_come, last_turn < turns, source + step * ((stage + LAST) % STAGES * W.tall), ring, bars, W)
        if W.ptx:
            loads_stay_above(thread)
        arrived = ()
        if W.bulk:
            arrived = taken(before + turn * STAGES + stage, ring, bars, W)
        for tile in tl.static_range(TALL):
            own = ()
            for group in tl.static_range(GROUPS):
                own += (total[(stage * TALL + tile) * GROUPS + group],)
            sums += _tile_added(own, arrived, now, tile, pairs, offset, levels, nested_map, table, dtype, W)
    return sums, ahead


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
    dtype: tl.constexpr = x.dtype.element_ty
    layer = tl.load(layers).to(tl.int64)
    codes, scales, nested = (codes_0, codes_1, codes_2), (scales_0, scales_1, scales_2), (nested_0, nested_1, nested_2)
    turns = turns_here(W)
    offsets = (0.0, 0.0, 0.0)
    if W.double_quant:
        offsets = (tl.load(offset_0 + layer), tl.load(offset_1 + layer), tl.load(offset_2 + layer))
    start = layer.to(tl.int32) * 0
    if W.ptx:
        start = place()
    ring, bars, room = start + RING_BYTES, start, start + SUMS_BYTES
    if W.bulk:
        bars, room = begun(ring, W), start + 128
        first_asked(turns, turns > 0, 0, codes, scales, layer, ring, bars, W)
    ahead = fetched_stage(tl.program_id(0) * 0, turns, 0, codes, scales, nested, z, b, layer, W)
    table = tl.zeros((THREADS,), tl.int32)
    if W.ptx:
        table = tables(start, nested_map, dtype, W.pitch, W.double_quant, THREADS)
    zero = tl.zeros((THREADS,), tl.float32)
    zeros = ((zero, zero, zero, zero),) * (W.per * W.groups)
    total = zeros
    whole = ()
    if W.chunks == 1:
        whole = of_chunk(x, 0, W)
    for turn in range(turns):
        chunk = turn % W.chunks
        pairs = whole if W.chunks == 1 else of_chunk(x, chunk, W)
        total, ahead = turn_added(
            total, ahead, turn, turns, 0, pairs, codes, scales, nested, offsets, z, b, layer, levels, nested_map, table, ring,
            bars, dtype, W,
        )  # fmt: skip
        if chunk == W.chunks - 1:
            first_tile = (tl.program_id(0) + turn // W.chunks * W.programs) * W.per
            _turn_stored(total, residual, out, room, first_tile, W)
            total = zeros


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
