"""What a tile of `linears` reads, lane by lane: codes, scales and cells of its weights, its part of LoRA's factors and of x."""

import triton
import triton.language as tl

from pallas_kernels.nf4.lane_kernels import scale_of, x_pairs
from pallas_kernels.nf4.ring_kernels import ask, sources


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
def fetched(turn, turns, item, codes, scales, nested, z, b, layer, W: tl.constexpr):
    """Of the `item`-th tile of a turn, whose inputs are a chunk: for output g and g+8 of it the codes of a run of blocks and
    their scales as they are stored, unless they come in bulk, and the cell's; a share of LoRA's factor and of what meets it."""
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
        down = item * 16 + half * 8
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
            row = g // RUN if W.apart else group * 8 + g
            there = row < W.rows
            if W.apart:
                there &= g % RUN == 0
            at = z.to(tl.pointer_type(tl.int64)) + (row * W.lora_weights + which) * (W.rank // 4) + warp * 4 + t
            found += (tl.load(at, mask=ranked & there, other=0),)
    return found


@triton.jit
def turn_sources(turn, codes, scales, layer, W: tl.constexpr):
    """`sources` of a turn's first tile, in its chunk."""
    tile, chunk = (tl.program_id(0) + turn // W.chunks * W.programs) * W.per, turn % W.chunks
    at = (layer * height_of(tile, W) + number_of(tile, W) * 16) * W.blocks + chunk * W.chunk
    of_codes = of_weight(codes[0], codes[1], codes[2], tile, W) + at * 32
    of_scales = of_weight(scales[0], scales[1], scales[2], tile, W) + at
    return sources(of_codes, of_scales, W)


@triton.jit
def first_asked(turns, wanted, before, codes, scales, layer, ring, bars, W: tl.constexpr):
    """Has the first stages of a product brought, one fewer than the ring has, if that is `wanted`; `before` were so many stages
    of other products."""
    AHEAD: tl.constexpr = W.slots - 1
    STAGES: tl.constexpr = W.stages
    last = tl.where(wanted, turns, 0)
    for stage in tl.static_range(AHEAD):
        turn = tl.program_id(0) * 0 + stage // STAGES
        first, step = turn_sources(turn, codes, scales, layer, W)
        ask(before + stage, turn < last, first + step * (stage % STAGES * W.tall), ring, bars, W)


@triton.jit
def turns_here(W: tl.constexpr):
    """How many this program takes, each as often as there are chunks."""
    return (W.turns - tl.program_id(0) + W.programs - 1) // W.programs * W.chunks


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
            result += (scale_of(found[FIRST] >> 8 * i, table, nested_map, W.pitch, W.ptx) * cell + offset,)
        else:
            result += (found[FIRST + i],)
    return result


@triton.jit
def own_scales(found, FIRST: tl.constexpr, cell, table, nested_map, offset, W: tl.constexpr):
    """The same of the two blocks whose columns the lane has of a product, where they are apart: 2t and 2t + 1, modulo the run."""
    RUN: tl.constexpr = W.run
    t = tl.arange(0, W.threads) % 4
    if W.double_quant:
        word = found[FIRST] >> (t * 16 & (RUN - 1) * 8)
        own = (
            scale_of(word, table, nested_map, W.pitch, W.ptx) * cell + offset,
            scale_of(word >> (8 & (RUN - 1) * 8), table, nested_map, W.pitch, W.ptx) * cell + offset,
        )
    elif RUN == 4:
        even = t % 2 == 0
        own = (
            tl.where(even, found[FIRST], found[FIRST + 2]),
            tl.where(even, found[FIRST + 1], found[FIRST + 3]),
        )
    else:
        own = (found[FIRST], found[FIRST + 1])
    return own


@triton.jit
def of_chunk(x, chunk, W: tl.constexpr):
    """The warp's part of x: for each group of eight rows the pairs of a run of blocks, each in columns of its own where they are
    apart: a row's i-th block is in column RUN * row + i."""
    RUN: tl.constexpr = W.run
    GROUPS: tl.constexpr = W.groups
    thread = tl.arange(0, W.threads)
    g, t, run = thread % 32 // 4, thread % 4, chunk * W.warps + thread // 32
    present = run < W.blocks // RUN
    block = tl.minimum(run, W.blocks // RUN - 1) * RUN
    pairs = ()
    for group in tl.static_range(GROUPS):
        for i in tl.static_range(RUN):
            row = g // RUN if W.apart else group * 8 + g
            mask = present & (row < W.rows)
            if W.apart:
                mask &= g % RUN == i
            pairs += (x_pairs(x.to(tl.pointer_type(tl.int64)), row, block + i, t, mask, W.blocks),)
    return pairs


@triton.jit
def loaded(now, AT: tl.constexpr, W: tl.constexpr):
    """Codes and scales of a tile as ring_kernels.taken has them, of what `fetched` loaded, from AT on."""
    RUN: tl.constexpr = W.run
    SCALES: tl.constexpr = W.scale_values
    found = ()
    for half in tl.static_range(2):
        for i in tl.static_range(RUN):
            found += words(now[AT + half * W.half + i])
        for i in tl.static_range(SCALES):
            found += (now[AT + half * W.half + RUN + i],)
    return found
