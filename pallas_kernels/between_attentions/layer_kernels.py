"""The Triton kernel of `between_attentions`: from a layer's attention to the next layer's queries, keys and values, one launch.

Of a launch of `linears` a third of the time goes by before codes arrive as fast as memory sends them, and at its end memory
waits again. Here programs stay for four products, and a product's first codes are on their way while the sums of the one
before are added up, while programs wait for each other, and while its input is made:

* A product's outputs are there for all programs once all have counted (meeting_kernels.py).
* Each program makes the norm of the whole input for itself, which takes less than to wait for a share of it.
* LoRA's first product is shared out, in pieces of a rank and a slice of x, before turns begin; who adds up a turn waits for all
  pieces then. The second is a product of tensor cores more, of each tile in another warp.
* A turn of gate is followed, of the same program, by the same outputs of up: nobody waits for SwiGLU.
"""

import triton
import triton.language as tl

from pallas_kernels.between_attentions.input_kernels import low_rank, normed, second_factors, share_of_low_rank
from pallas_kernels.between_attentions.meeting_kernels import arrive, wait
from pallas_kernels.nf4.grouped_kernels import fetched_stage, places, summed, turn_added
from pallas_kernels.nf4.lane_kernels import place, product_added, tables
from pallas_kernels.nf4.ring_kernels import RING_BYTES, begun
from pallas_kernels.nf4.tile_kernels import first_asked, number_of, of_chunk, of_weight, start_of, turns_here, words


@triton.jit
def _with_low_rank(total, factors, z, dtype: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    """A turn's sums with z B, each tile's in a warp of its own."""
    PER: tl.constexpr = P.per
    GROUPS: tl.constexpr = L.rank // 16
    warp = tl.arange(0, P.threads) // 32
    sums = ()
    for tile in tl.static_range(PER):
        s = total[tile]
        for k in tl.static_range(GROUPS):
            u0, u1 = words(tl.where(warp == tile, factors[2 * k], 0))
            v0, v1 = words(tl.where(warp == tile, factors[2 * k + 1], 0))
            s = product_added((u0, v0, u1, v1), z[2 * k], z[2 * k + 1], s, dtype, P.warps, P.ptx)
        sums += (s,)
    return sums


@triton.jit
def _stored(total, residual, gates, out, room, tile, SWIGLU: tl.constexpr, P: tl.constexpr):
    """A turn's sums: with what they are added to, or as gates, kept for the turn of their ups, which stores what they make."""
    PER: tl.constexpr = P.per
    ONCE: tl.constexpr = P.summed_at_once
    INNER: tl.constexpr = P.heights[0]
    dtype: tl.constexpr = out.dtype.element_ty
    for start in tl.static_range(0, PER, ONCE):
        y = summed(total, room, start, min(ONCE, PER - start), P.parts, P)
        m, n, mask = places(tile, start, min(ONCE, PER - start), P.parts, P)
        if SWIGLU:
            ups = tile >= P.first_tiles[1]
            n = tl.where(ups, n - INNER, n)
            at = m * INNER + n
            gate = tl.load(gates + at, mask=tl.where(ups, mask, False), other=0.0).to(tl.float32)
            rounded = y.to(dtype)
            made = (gate * tl.sigmoid(gate) * rounded.to(tl.float32)).to(dtype)
            tl.store(gates + at, rounded, mask=tl.where(ups, False, mask))
            tl.store(out + at, made, mask=tl.where(ups, mask, False))
        else:
            if P.residual:
                y += tl.load(residual + m * P.outputs + n, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + m * P.outputs + n, y.to(dtype), mask=mask)


@triton.jit
def _product(
    x,
    weights,
    layer,
    turns,
    before,
    ahead,
    parts,
    b,
    shared,
    residual,
    gates,
    out,
    next_weights,
    next_layer,
    next_turns,
    levels,
    nested_map,
    table,
    ring,
    bars,
    room,
    SWIGLU: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
):
    """All turns of a product P of x; the first stages of the next one, N, are asked for before the last turn is added up.

    `before`: the stages of earlier products. `shared`: what counts the programs that have made their share of LoRA's product L.
    """
    THREADS: tl.constexpr = P.threads
    codes, scales, nested, offsets = weights
    CHUNKS: tl.constexpr = P.chunks
    PER: tl.constexpr = P.per
    dtype: tl.constexpr = x.dtype.element_ty
    zero = tl.zeros((THREADS,), tl.float32)
    zeros = ((zero, zero, zero, zero),) * PER
    total = zeros
    whole = ()
    if CHUNKS == 1:
        whole = of_chunk(x, 0, P)
    for turn in range(turns):
        chunk, tile = turn % CHUNKS, (tl.program_id(0) + turn // CHUNKS * P.programs) * PER
        factors = ()
        if L.rank > 0:
            first = start_of(tile, P) + number_of(tile, P) * 16
            factors = second_factors(b, layer, first, chunk == CHUNKS - 1, L, P)
        pairs = whole if CHUNKS == 1 else of_chunk(x, chunk, P)
        total, ahead = turn_added(
            total, ahead, turn, turns, before, pairs, codes, scales, nested, offsets, x, x, layer, levels, nested_map, table,
            ring, bars, dtype, P,
        )  # fmt: skip
        if chunk == CHUNKS - 1:
            next_before, last = before + turns * P.stages, turn == turns - 1
            first_asked(next_turns, last, next_before, next_weights[0], next_weights[1], next_layer, ring, bars, N)
            if L.rank > 0:
                wait(shared, W)
                z = low_rank(parts, of_weight(0, 1, 2, tile, P), dtype, L, P)
                total = _with_low_rank(total, factors, z, dtype, L, P)
            _stored(total, residual, gates, out, room, tile, SWIGLU, P)
            total = zeros


@triton.jit
def between_attentions_kernel(
    x,
    o,
    codes_o,
    scales_o,
    nested_o,
    offset_o,
    codes_gate,
    scales_gate,
    nested_gate,
    offset_gate,
    codes_up,
    scales_up,
    nested_up,
    offset_up,
    codes_down,
    scales_down,
    nested_down,
    offset_down,
    codes_q,
    scales_q,
    nested_q,
    offset_q,
    codes_k,
    scales_k,
    nested_k,
    offset_k,
    codes_v,
    scales_v,
    nested_v,
    offset_v,
    a_o,
    b_o,
    a_mlp,
    b_mlp,
    a_down,
    b_down,
    a_qkv,
    b_qkv,
    mlp_norm,
    qkv_norm,
    levels,
    nested_map,
    layers,
    counts,
    m,
    gates,
    h,
    own,
    parts,
    y,
    qkv,
    counted,
    W: tl.constexpr,
):
    """y [rows, hidden] and the next layer's qkv [rows, outputs], of a layer's residual stream x [rows, hidden] and its
    attention's output o [rows, width]. W: see LayerWork.

    Room for what is passed on: m like x, gates and h [rows, inner], own [programs, rows, hidden], parts of all LowRank.
    `counted` [layers, 8] is `counts`, in place.
    """
    O: tl.constexpr = W.o
    MLP: tl.constexpr = W.mlp
    DOWN: tl.constexpr = W.down
    QKV: tl.constexpr = W.qkv
    LOW_O: tl.constexpr = W.low_o
    LOW_MLP: tl.constexpr = W.low_mlp
    LOW_DOWN: tl.constexpr = W.low_down
    LOW_QKV: tl.constexpr = W.low_qkv
    dtype: tl.constexpr = x.dtype.element_ty
    layer = tl.load(layers).to(tl.int64)
    next_layer = tl.minimum(layer + 1, W.layers - 1)
    count = counted + layer * 8
    own += tl.program_id(0) * (W.rows * W.hidden)
    of_o = (
        (codes_o, codes_o, codes_o),
        (scales_o, scales_o, scales_o),
        (nested_o, nested_o, nested_o),
        (tl.load(offset_o + layer), tl.load(offset_o + layer), tl.load(offset_o + layer)),
    )
    of_mlp = (
        (codes_gate, codes_up, codes_up),
        (scales_gate, scales_up, scales_up),
        (nested_gate, nested_up, nested_up),
        (tl.load(offset_gate + layer), tl.load(offset_up + layer), tl.load(offset_up + layer)),
    )
    of_down = (
        (codes_down, codes_down, codes_down),
        (scales_down, scales_down, scales_down),
        (nested_down, nested_down, nested_down),
        (tl.load(offset_down + layer), tl.load(offset_down + layer), tl.load(offset_down + layer)),
    )
    of_qkv = (
        (codes_q, codes_k, codes_v),
        (scales_q, scales_k, scales_v),
        (nested_q, nested_k, nested_v),
        (tl.load(offset_q + next_layer), tl.load(offset_k + next_layer), tl.load(offset_v + next_layer)),
    )
    o_turns, mlp_turns, down_turns = turns_here(O), turns_here(MLP), turns_here(DOWN)
    qkv_turns = tl.where(layer + 1 < W.layers, turns_here(QKV), 0)
    before_mlp = o_turns * O.stages
    before_down = before_mlp + mlp_turns * MLP.stages
    before_qkv = before_down + down_turns * DOWN.stages
    none = tl.program_id(0) * 0
    start = place()
    ring, room = start + RING_BYTES, start + 128  # beside the pairs of levels
    bars = begun(ring, O)
    first_asked(o_turns, o_turns > 0, 0, of_o[0], of_o[1], layer, ring, bars, O)
    ahead = fetched_stage(none, o_turns, 0, of_o[0], of_o[1], of_o[2], x, x, layer, O)
    table = tables(start, nested_map, dtype, O.pitch, True, W.threads)
    if LOW_O.rank > 0:
        share_of_low_rank(o, a_o, layer, parts + LOW_O.first, room, LOW_O, W)
    arrive(count, W)
    _product(
        o, of_o, layer, o_turns, 0, ahead, parts + LOW_O.first, b_o, count, x, gates, m, of_mlp, layer, mlp_turns,
        levels, nested_map, table, ring, bars, room, False, O, LOW_O, MLP, W,
    )  # fmt: skip
    arrive(count + 1, W)
    ahead = fetched_stage(none, mlp_turns, 0, of_mlp[0], of_mlp[1], of_mlp[2], x, x, layer, MLP)
    wait(count + 1, W)
    normed(m, mlp_norm + layer * W.hidden, own, room, W)
    if LOW_MLP.rank > 0:
        share_of_low_rank(own, a_mlp, layer, parts + LOW_MLP.first, room, LOW_MLP, W)
    arrive(count + 2, W)
    _product(
        own, of_mlp, layer, mlp_turns, before_mlp, ahead, parts + LOW_MLP.first, b_mlp, count + 2, x, gates, h, of_down, layer,
        down_turns, levels, nested_map, table, ring, bars, room, True, MLP, LOW_MLP, DOWN, W,
    )  # fmt: skip
    arrive(count + 3, W)
    ahead = fetched_stage(none, down_turns, 0, of_down[0], of_down[1], of_down[2], x, x, layer, DOWN)
    wait(count + 3, W)
    if LOW_DOWN.rank > 0:
        share_of_low_rank(h, a_down, layer, parts + LOW_DOWN.first, room, LOW_DOWN, W)
    arrive(count + 4, W)
    _product(
        h, of_down, layer, down_turns, before_down, ahead, parts + LOW_DOWN.first, b_down, count + 4, m, gates, y, of_qkv,
        next_layer, qkv_turns, levels, nested_map, table, ring, bars, room, False, DOWN, LOW_DOWN, QKV, W,
    )  # fmt: skip
    arrive(count + 5, W)
    ahead = fetched_stage(none, qkv_turns, 0, of_qkv[0], of_qkv[1], of_qkv[2], x, x, next_layer, QKV)
    wait(count + 5, W)
    normed(y, qkv_norm + next_layer * W.hidden, own, room, W)
    if LOW_QKV.rank > 0:
        share_of_low_rank(own, a_qkv, next_layer, parts + LOW_QKV.first, room, LOW_QKV, W)
    arrive(count + 6, W)
    _product(
        own, of_qkv, next_layer, qkv_turns, before_qkv, ahead, parts + LOW_QKV.first, b_qkv, count + 6, x, gates, qkv, of_qkv,
        next_layer, none, levels, nested_map, table, ring, bars, room, False, QKV, LOW_QKV, QKV, W,
    )  # fmt: skip
