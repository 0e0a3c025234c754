"""What a tile of `linears` reads, lane by lane: codes, scales and cells of its weights, its part of LoRA's factors and of x."""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import scale_of, x_pairs
from pallas_kernels.nf4.ring_kernels import ask


@triton.jit
def of_weight(first, second, third, tile, TILES_0: tl.constexpr, TILES_1: tl.constexpr):
    """What belongs to the weight that a tile is of."""
    return tl.where(tile < TILES_0, first, tl.where(tile < TILES_0 + TILES_1, second, third))


@triton.jit
def fetched(
    turn,
    turns,
    ITEM: tl.constexpr,
    codes,
    scales,
    nested,
    z,
    b,
    layer,
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
    RUN: tl.constexpr,
    CHUNKS: tl.constexpr,
    PER: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BULK: tl.constexpr,
):
    """Of the ITEM-th tile of a turn, whose inputs are a chunk: for output g and g+8 of it the codes of RUN blocks and their
    scales as they are stored, unless they come in BULK, and the cell's; and a share of LoRA's factor and of what meets it."""
    TILES_0: tl.constexpr = (N_0 + 15) // 16
    TILES_1: tl.constexpr = (N_1 + 15) // 16
    FULL: tl.constexpr = N_0 % 16 == 0 and N_1 % 16 == 0 and N_2 % 16 == 0
    tl.static_assert(
        PER == 1 or (FULL and TILES_0 % PER == 0 and TILES_1 % PER == 0), "a turn's tiles are of one weight"
    )
    thread = tl.arange(0, WARPS * 32)
    g, t, warp = thread % 32 // 4, thread % 4, thread // 32
    # all but the last offsets belong to the turn, and cost registers once
    tile, chunk = (tl.program_id(0) + turn // CHUNKS * PROGRAMS) * PER, turn % CHUNKS
    height = of_weight(N_0, N_1, N_2, tile, TILES_0, TILES_1)
    before = of_weight(0, N_0, N_0 + N_1, tile, TILES_0, TILES_1)
    own = tile - of_weight(0, TILES_0, TILES_0 + TILES_1, tile, TILES_0, TILES_1)
    of_codes = of_weight(codes[0], codes[1], codes[2], tile, TILES_0, TILES_1)
    of_scales = of_weight(scales[0], scales[1], scales[2], tile, TILES_0, TILES_1)
    of_nested = of_weight(nested[0], nested[1], nested[2], tile, TILES_0, TILES_1)
    if DOUBLE:
        cells = of_weight(NESTED_0, NESTED_1, NESTED_2, tile, TILES_0, TILES_1)
        of_nested += layer * cells * NESTED_COLUMNS
    run = chunk * WARPS + warp
    there = tl.where(turn < turns, run, SCALE_COLUMNS) < SCALE_COLUMNS // RUN
    block = tl.minimum(run, SCALE_COLUMNS // RUN - 1) * RUN
    n = own * 16 + g
    of_scales += layer * height * SCALE_COLUMNS + n * SCALE_COLUMNS + block
    of_codes = of_codes.to(tl.pointer_type(tl.int64)) + layer * height * SCALE_COLUMNS * 4
    of_codes += (n * SCALE_COLUMNS + block) * 4 + t
    of_b = b.to(tl.pointer_type(tl.int64)) + (layer * (N_0 + N_1 + N_2) + before + n) * (RANK // 4) + warp * 4 + t
    ranked = tl.where((chunk == 0) & (turn < turns), warp, WARPS) < RANK // 16
    WORD: tl.constexpr = tl.uint8 if RUN == 1 else (tl.int16 if RUN == 2 else tl.int32)
    found = ()
    for half in tl.static_range(2):
        down = ITEM * 16 + half * 8
        if not FULL:
            down = tl.minimum(n + down, height - 1) - n  # repeated past the end, and not stored
        if not BULK:
            for i in tl.static_range(RUN):
                found += (tl.load(of_codes + (down * SCALE_COLUMNS * 4 + i * 4), mask=there, other=0),)
        at = of_scales + down * SCALE_COLUMNS
        if DOUBLE:
            if not BULK:
                found += (tl.load(at.to(tl.pointer_type(WORD)), mask=there, other=0).to(tl.int32),)
            cell = (n + down) // CELL_ROWS * NESTED_COLUMNS
            if NESTED_COLUMNS > 1:
                cell += block // CELL_COLUMNS
            found += (tl.load(of_nested + cell, mask=there, other=0.0),)
        else:
            for i in tl.static_range(RUN):
                found += (tl.load(at + i, mask=there, other=0.0),)
        if RANK > 0:
            found += (tl.load(of_b + down * (RANK // 4), mask=ranked, other=0),)
    if RANK > 0:
        which = of_weight(0, 1, 2, tile, TILES_0, TILES_1)
        for group in tl.static_range((M + 7) // 8):
            row = group * 8 + g
            at = z.to(tl.pointer_type(tl.int64)) + (row * WEIGHTS + which) * (RANK // 4) + warp * 4 + t
            found += (tl.load(at, mask=ranked & (row < M), other=0),)
    return found


@triton.jit
def asked(
    turn,
    turns,
    ITEM: tl.constexpr,
    codes,
    scales,
    layer,
    ring,
    bars,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    CHUNKS: tl.constexpr,
    PER: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Has the codes and scales of the ITEM-th tile of a turn brought, if there is such a turn."""
    TILES_0: tl.constexpr = (N_0 + 15) // 16
    TILES_1: tl.constexpr = (N_1 + 15) // 16
    tile, chunk = (tl.program_id(0) + turn // CHUNKS * PROGRAMS) * PER + ITEM, turn % CHUNKS
    height = of_weight(N_0, N_1, N_2, tile, TILES_0, TILES_1)
    own = tile - of_weight(0, TILES_0, TILES_0 + TILES_1, tile, TILES_0, TILES_1)
    at = (layer * height + own * 16) * SCALE_COLUMNS + chunk * (RUN * WARPS)
    ask(
        turn * PER + ITEM,
        turn < turns,
        of_weight(codes[0], codes[1], codes[2], tile, TILES_0, TILES_1) + at * 32,
        of_weight(scales[0], scales[1], scales[2], tile, TILES_0, TILES_1) + at,
        height - 1 - own * 16,
        ring,
        bars,
        SCALE_COLUMNS,
        SLOTS,
        RUN * WARPS,
        WARPS,
    )


@triton.jit
def words(pair):
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def scales_of(
    found,
    first: tl.constexpr,
    cell,
    table,
    nested_map,
    offset,
    DOUBLE: tl.constexpr,
    RUN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Of RUN blocks, from what was fetched of them, at `first`, and of their cell."""
    result = ()
    for i in tl.static_range(RUN):
        if DOUBLE:
            result += (scale_of(found[first] >> 8 * i, table, nested_map, PTX) * cell + offset,)
        else:
            result += (found[first + i],)
    return result


@triton.jit
def of_chunk(x, chunk, M: tl.constexpr, SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """The warp's part of x: for each group of eight rows the pairs of RUN blocks."""
    thread = tl.arange(0, WARPS * 32)
    g, t, run = thread % 32 // 4, thread % 4, chunk * WARPS + thread // 32
    present = run < SCALE_COLUMNS // RUN
    block = tl.minimum(run, SCALE_COLUMNS // RUN - 1) * RUN
    pairs = ()
    for group in tl.static_range((M + 7) // 8):
        row = group * 8 + g
        for i in tl.static_range(RUN):
            mask = present & (row < M)
            pairs += (x_pairs(x.to(tl.pointer_type(tl.int64)), row, block + i, t, mask, SCALE_COLUMNS),)
    return pairs


@triton.jit
def loaded(now, HALF: tl.constexpr, RUN: tl.constexpr, SCALES: tl.constexpr):
    """Codes and scales as ring_kernels.taken has them, of what `fetched` loaded."""
    found = ()
    for half in tl.static_range(2):
        for i in tl.static_range(RUN):
            found += words(now[half * HALF + i])
        for i in tl.static_range(SCALES):
            found += (now[half * HALF + RUN + i],)
    return found
