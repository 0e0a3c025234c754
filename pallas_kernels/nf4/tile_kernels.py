"""What a tile of `linears` reads, lane by lane: codes, scales and cells of its weights, its part of LoRA's factors and of x."""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import scale_of, x_pairs
from pallas_kernels.nf4.ring_kernels import ask


@triton.jit
def of_weight(first, second, third, tile, W: tl.constexpr):
    """What belongs to the weight that a tile is of."""
    return tl.where(tile < W.first_tiles[1], first, tl.where(tile < W.first_tiles[2], second, third))


@triton.jit
def height_of(tile, W: tl.constexpr):
    """How many outputs the tile's weight has."""
    return of_weight(W.heights[0], W.heights[1], W.heights[2], tile, W)


@triton.jit
def start_of(tile, W: tl.constexpr):
    """The first output of the tile's weight, among those of all."""
    return of_weight(W.starts[0], W.starts[1], W.starts[2], tile, W)


@triton.jit
def number_of(tile, W: tl.constexpr):
    """Which of its weight's tiles this one is."""
    return tile - of_weight(W.first_tiles[0], W.first_tiles[1], W.first_tiles[2], tile, W)


@triton.jit
def fetched(turn, turns, ITEM: tl.constexpr, codes, scales, nested, z, b, layer, W: tl.constexpr):
    """Of the ITEM-th tile of a turn, whose inputs are a chunk: for output g and g+8 of it the codes of a run of blocks and their
    scales as they are stored, unless they come in bulk, and the cell's; and a share of LoRA's factor and of what meets it."""
    RUN: tl.constexpr = W.run
    GROUPS: tl.constexpr = W.groups
    tl.static_assert(
        W.per == 1 or (W.whole_tiles and W.first_tiles[1] % W.per == 0 and W.first_tiles[2] % W.per == 0),
        "a turn's tiles are of one weight",
    )
    thread = tl.arange(0, W.threads)
    g, t, warp = thread % 32 // 4, thread % 4, thread // 32
    # all but the last offsets belong to the turn, and cost registers once
    tile, chunk = (tl.program_id(0) + turn // W.chunks * W.programs) * W.per, turn % W.chunks
    height, before, own = height_of(tile, W), start_of(tile, W), number_of(tile, W)
    of_codes, of_scales = (
        of_weight(codes[0], codes[1], codes[2], tile, W),
        of_weight(scales[0], scales[1], scales[2], tile, W),
    )
    of_nested = of_weight(nested[0], nested[1], nested[2], tile, W)
    if W.double_quant:
        cells = of_weight(W.nested_heights[0], W.nested_heights[1], W.nested_heights[2], tile, W)
        of_nested += layer * cells * W.nested_columns
    run = chunk * W.warps + warp
    there = tl.where(turn < turns, run, W.blocks) < W.blocks // RUN
    block = tl.minimum(run, W.blocks // RUN - 1) * RUN
    n = own * 16 + g
    of_scales += layer * height * W.blocks + n * W.blocks + block
    of_codes = of_codes.to(tl.pointer_type(tl.int64)) + layer * height * W.blocks * 4
    of_codes += (n * W.blocks + block) * 4 + t
    of_b = b.to(tl.pointer_type(tl.int64)) + (layer * W.outputs + before + n) * (W.rank // 4) + warp * 4 + t
    ranked = tl.where((chunk == 0) & (turn < turns), warp, W.warps) < W.rank // 16
    WORD: tl.constexpr = tl.uint8 if RUN == 1 else (tl.int16 if RUN == 2 else tl.int32)
    found = ()
    for half in tl.static_range(2):
        down = ITEM * 16 + half * 8
        if not W.whole_tiles:
            down = tl.minimum(n + down, height - 1) - n  # repeated past the end, and not stored
        if not W.bulk:
            for i in tl.static_range(RUN):
                found += (tl.load(of_codes + (down * W.blocks * 4 + i * 4), mask=there, other=0),)
        at = of_scales + down * W.blocks
        if W.double_quant:
            if not W.bulk:
                found += (tl.load(at.to(tl.pointer_type(WORD)), mask=there, other=0).to(tl.int32),)
            cell = (n + down) // W.cell[0] * W.nested_columns
            if W.nested_columns > 1:
                cell += block // W.cell[1]
            found += (tl.load(of_nested + cell, mask=there, other=0.0),)
        else:
            for i in tl.static_range(RUN):
                found += (tl.load(at + i, mask=there, other=0.0),)
        if W.rank > 0:
            found += (tl.load(of_b + down * (W.rank // 4), mask=ranked, other=0),)
    if W.rank > 0:
        which = of_weight(0, 1, 2, tile, W)
        for group in tl.static_range(GROUPS):
            row = group * 8 + g
            at = z.to(tl.pointer_type(tl.int64)) + (row * W.lora_weights + which) * (W.rank // 4) + warp * 4 + t
            found += (tl.load(at, mask=ranked & (row < W.rows), other=0),)
    return found


@triton.jit
def asked(turn, turns, ITEM: tl.constexpr, codes, scales, layer, ring, bars, W: tl.constexpr):
    """Has the codes and scales of the ITEM-th tile of a turn brought, if there is such a turn."""
    tile, chunk = (tl.program_id(0) + turn // W.chunks * W.programs) * W.per + ITEM, turn % W.chunks
    height, own = height_of(tile, W), number_of(tile, W)
    at = (layer * height + own * 16) * W.blocks + chunk * W.chunk
    stage, wanted = turn * W.per + ITEM, turn < turns
    of_codes = of_weight(codes[0], codes[1], codes[2], tile, W) + at * 32
    of_scales = of_weight(scales[0], scales[1], scales[2], tile, W) + at
    ask(stage, wanted, of_codes, of_scales, height - 1 - own * 16, ring, bars, W)


@triton.jit
def words(pair):
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def scales_of(found, FIRST: tl.constexpr, cell, table, nested_map, offset, W: tl.constexpr):
    """Of a run of blocks, from what was fetched of them, at FIRST, and of their cell."""
    RUN: tl.constexpr = W.run
    result = ()
    for i in tl.static_range(RUN):
        if W.double_quant:
            result += (scale_of(found[FIRST] >> 8 * i, table, nested_map, W.ptx) * cell + offset,)
        else:
            result += (found[FIRST + i],)
    return result


@triton.jit
def of_chunk(x, chunk, W: tl.constexpr):
    """The warp's part of x: for each group of eight rows the pairs of a run of blocks."""
    RUN: tl.constexpr = W.run
    GROUPS: tl.constexpr = W.groups
    thread = tl.arange(0, W.threads)
    g, t, run = thread % 32 // 4, thread % 4, chunk * W.warps + thread // 32
    present = run < W.blocks // RUN
    block = tl.minimum(run, W.blocks // RUN - 1) * RUN
    pairs = ()
    for group in tl.static_range(GROUPS):
        row = group * 8 + g
        for i in tl.static_range(RUN):
            mask = present & (row < W.rows)
            pairs += (x_pairs(x.to(tl.pointer_type(tl.int64)), row, block + i, t, mask, W.blocks),)
    return pairs


@triton.jit
def loaded(now, W: tl.constexpr):
    """Codes and scales as ring_kernels.taken has them, of what `fetched` loaded."""
    RUN: tl.constexpr = W.run
    SCALES: tl.constexpr = W.scale_values
    found = ()
    for half in tl.static_range(2):
        for i in tl.static_range(RUN):
            found += words(now[half * W.half + i])
        for i in tl.static_range(SCALES):
            found += (now[half * W.half + RUN + i],)
    return found
