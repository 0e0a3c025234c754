"""The forward pass for Hopper, in Pallas Mosaic GPU: three warpgroups, one loads, two compute 64 queries each.

A program stays on its multiprocessor and takes work items (a tile of 128 queries of one head) in rounds: the tiles with
most keys first, and each round in the opposite direction, which evens the sums out. While the computing warpgroups
finish an item, the loading one already fetches the next: its queries, and blocks of keys and values through a ring.

The computing warpgroups take turns on the tensor cores. One's turn is o += p_j v_j and s = q k_{j+1}^T, both only issued;
while they run, the other makes p of its s. A barrier that both arrive at hands the turn over, and one of the two has
arrived once more than the other, so that they stay half a step apart.

Which blocks of keys an item visits comes from `schedule`: [first, first without mask, end without mask, end).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.flash_attention.segments import GRAIN, SegmentMetadata

LOG2E = 1.4426950408889634
WARPGROUPS = 2
ROWS = 64  # queries of a computing warpgroup
TILE = WARPGROUPS * ROWS


@dataclass(frozen=True)
class Tiles:
    """Keys of a block, and blocks of keys and of values in shared memory at a time."""

    keys: int
    stages: int

    def __post_init__(self) -> None:
        if self.keys not in (64, 128) or self.stages < 2:
            raise ValueError(f"{self}: blocks of 64 or 128 keys, at least 2 stages.")


def default_tiles(depth: int) -> Tiles:
    """What 227 KB hold beside queries and outputs."""
    return {64: Tiles(128, 4), 128: Tiles(128, 2), 192: Tiles(64, 2), 256: Tiles(64, 2)}[depth]


def obstacle(q: jax.Array, options: Options) -> str | None:
    """Why this kernel cannot serve the call, None where it can."""
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 or bfloat16, not {q.dtype}"
    if q.shape[-1] % 64 or q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is not 64, 128, 192 or 256"
    if q.shape[1] % 8:
        return f"{q.shape[1]} positions are no multiple of 8, the rows of a tile in shared memory"
    if options.dropout_rate:
        return f"it has no dropout, and dropout_rate={options.dropout_rate}"
    if options.scale <= 0:
        return f"it needs a positive scale, not {options.scale}"
    if (capability := cuda_capability()) is None or capability[0] != 9:
        return "it needs a Hopper GPU (compute capability 9.0) as jax's default device"
    return None


def schedule(length: int, segments: SegmentMetadata | None, options: Options, keys: int) -> jax.Array:
    """int32 [B or 1, tiles, 4]: which blocks of keys a tile of queries visits, at least one."""
    tiles = -(-length // TILE)
    own = np.arange(tiles, dtype=np.int32)[None] * TILE
    lo, hi, full_lo, full_hi = 0 * own, 0 * own + length, 0 * own, 0 * own + length
    if options.causal:
        hi, full_hi = np.minimum(hi, own + TILE), np.minimum(full_hi, own + 1)
    if options.sliding_window is not None:
        lo = np.maximum(lo, own - options.sliding_window + 1)
        full_lo = np.maximum(full_lo, own + TILE - options.sliding_window)
    if segments is not None:
        ranges = segments.ranges[:, : tiles * (TILE // GRAIN)].reshape(-1, tiles, TILE // GRAIN, 4)
        lo = jnp.maximum(lo, ranges[..., 0].min(-1))
        hi = jnp.minimum(hi, ranges[..., 1].max(-1))
        full_lo = jnp.maximum(full_lo, ranges[..., 2].max(-1))
        full_hi = jnp.minimum(full_hi, ranges[..., 3].min(-1))
    xnp: Any = np if segments is None else jnp
    lo, full_lo, full_hi, hi = lo // keys, -(-full_lo // keys), full_hi // keys, -(-hi // keys)
    empty = hi <= lo
    lo, hi = xnp.where(empty, 0, lo), xnp.where(empty, 1, hi)
    none = (full_hi <= full_lo) | empty
    full_lo, full_hi = xnp.where(none, lo, full_lo), xnp.where(none, lo, full_hi)
    return jnp.asarray(xnp.stack([lo, full_lo, full_hi, hi], axis=-1), jnp.int32)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: SegmentMetadata | None,
    options: Options,
    tiles: Tiles | None = None,
    programs: int = 132,
    interpreted: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out [B, S, N, D] and lse [B, N, S]."""
    batch, length, heads, depth = q.shape
    tiles = tiles or default_tiles(depth)
    count = -(-length // TILE)
    items = batch * heads * count
    plan = schedule(length, segments, options, tiles.keys)
    ids = jnp.zeros((1, 128), jnp.int32) if segments is None else segments.ids
    kernel = _Forward(q.shape, k.shape[2], segments is not None, options, tiles, min(programs, items), interpreted)
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = partial(plgpu.SMEM, dtype=q.dtype, transforms=transforms)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, count * TILE), jnp.float32),
        ),
        scratch_types=(
            smem((WARPGROUPS, ROWS, depth)),
            None if kernel.shared else smem((WARPGROUPS, ROWS, depth)),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            smem((WARPGROUPS, ROWS, tiles.keys)) if interpreted else None,
            smem((tiles.stages, tiles.keys, depth)),
            smem((tiles.stages, tiles.keys, depth)),
            (plgpu.Barrier(num_barriers=WARPGROUPS), plgpu.Barrier(num_arrivals=WARPGROUPS)),
            (
                plgpu.Barrier(num_barriers=tiles.stages),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
            ),
            (
                plgpu.Barrier(num_barriers=tiles.stages),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(kernel.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, plan.reshape(-1), ids)
    return out, lse[..., :length]


@dataclass(frozen=True)
class _Forward:
    """The kernel's body, given its constants."""

    q_shape: tuple[int, ...]
    kv_heads: int
    segments: bool
    options: Options
    tiles: Tiles
    programs: int
    interpreted: bool  # jax's interpreter for the CPU knows neither accumulators with a first value nor operands in registers

    @property
    def shared(self) -> bool:
        """Whether outputs take their queries' place, where there is no room for both."""
        return self.q_shape[3] > 192

    def __call__(self, q, k, v, plan, ids, out, lse, q_smem, o_smem, lse_smem, p_smem, k_smem, v_smem, qb, kb, vb, turn):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.load(q, k, v, plan, q_smem, k_smem, v_smem, qb, kb, vb)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.compute(plan, ids, out, lse, q_smem, o_smem, lse_smem, p_smem, k_smem, v_smem, qb, kb, vb, turn, warpgroup)

    # which items

    def rounds(self) -> jax.Array:
        """How many items this program takes."""
        program = lax.axis_index("program")
        full, rest = divmod(self.items, self.programs)
        return full + (self.place(full, program) < rest).astype(jnp.int32)

    @property
    def items(self) -> int:
        batch, length, heads, _ = self.q_shape
        return batch * heads * -(-length // TILE)

    def place(self, number: Any, program: jax.Array) -> jax.Array:
        """Odd rounds run backwards."""
        return jnp.where(number % 2 == 0, program, self.programs - 1 - program)

    def item(self, number: jax.Array, plan: Any) -> tuple:
        """(row of the batch, head, tile, the four entries of its schedule)."""
        batch, length, heads, _ = self.q_shape
        count = -(-length // TILE)
        index = number * self.programs + self.place(number, lax.axis_index("program"))
        tile = count - 1 - lax.div(index, np.int32(batch * heads))
        column = lax.rem(index, np.int32(batch * heads))
        row, head = lax.div(column, np.int32(heads)), lax.rem(column, np.int32(heads))
        at = ((row * count if self.segments else 0) + tile) * 4
        return row, head, tile, tuple(plan[at + i] for i in range(4))

    # the loading warpgroup

    def load(self, q, k, v, plan, q_smem, k_smem, v_smem, qb, kb, vb):
        stages, keys = np.int32(self.tiles.stages), self.tiles.keys
        (q_full, q_free), (k_full, k_free), (v_full, v_free) = qb, kb, vb

        def one_item(number, done):
            row, head, tile, (lo, _, _, hi) = self.item(number, plan)
            kv_head = lax.div(head, np.int32(self.q_shape[2] // self.kv_heads))

            @pl.when(number > 0)
            def _():
                plgpu.barrier_wait(q_free)

            for w in range(WARPGROUPS):
                rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q.at[row, rows, head], q_smem.at[w], q_full.at[w])

            def one_block(block, done):
                slot = lax.rem(done, stages)
                rows = pl.ds(block * keys, keys)
                for source, smem, full, free in ((k, k_smem, k_full, k_free), (v, v_smem, v_full, v_free)):

                    @pl.when(done >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(source.at[row, rows, kv_head], smem.at[slot], full.at[slot])
                return done + 1

            return lax.fori_loop(lo, hi, one_block, done)

        done = lax.fori_loop(0, self.rounds(), one_item, jnp.int32(0))

        @pl.loop(jnp.maximum(done - stages, 0), done)
        def _(block):
            plgpu.barrier_wait(k_free.at[lax.rem(block, stages)])
            plgpu.barrier_wait(v_free.at[lax.rem(block, stages)])

        plgpu.barrier_wait(q_free)

    # the computing warpgroups

    def compute(self, plan, ids, out, lse, q_smem, o_smem, lse_smem, p_smem, k_smem, v_smem, qb, kb, vb, turn, warpgroup):
        (q_full, q_free), (k_full, k_free), (v_full, v_free) = qb, kb, vb
        stages, keys, depth = np.int32(self.tiles.stages), self.tiles.keys, self.q_shape[3]
        dtype = q_smem.dtype
        factor = LOG2E * (self.options.soft_cap or self.options.scale)
        q_own = q_smem.at[warpgroup]
        o_smem = q_smem if self.shared else o_smem
        row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

        def hand_over():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def issue_pv(acc, p, slot):
            plgpu.wgmma(acc, p_smem.at[warpgroup] if self.interpreted else p, v_smem.at[slot])

        def issue_qk(s, done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.wgmma(s, q_own, k_smem.at[slot].T)

        def soften(s, state, place, masked):
            """State after the logits s of a block, and its weights in 16 bits."""
            acc, top, total = state
            x = self.bounded(s)
            if masked:
                x = jnp.where(self.visible(ids, place, row_layout, column_layout), x, -jnp.inf)
            higher = jnp.maximum(top, x.max(axis=1) * factor)
            shift = jnp.where(higher == -jnp.inf, 0.0, higher) if masked else higher
            p = jnp.exp2(x * factor - lax.broadcast_in_dim(shift, x.shape, [0]))
            shrink = jnp.exp2(top - shift)
            total = total * shrink + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            p = p.astype(dtype)
            if self.interpreted:
                p_smem[warpgroup] = p
            return (acc, higher, total), p

        def one_item(number, done):
            row, head, tile, (lo, full_lo, full_hi, hi) = self.item(number, plan)
            own = tile * TILE + warpgroup * ROWS
            plgpu.barrier_wait(q_full.at[warpgroup])
            hand_over()

            def first(s):
                issue_qk(s, done)
                hand_over()
                return s[...]

            s = pl.run_scoped(first, plgpu.ACC((ROWS, keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[lax.rem(done, stages)])

            def one_block(block, carry, masked):
                s, state, done = carry
                slot, following = lax.rem(done, stages), lax.rem(done + 1, stages)
                (acc, top, total), p = soften(s, state, (row, own, block * keys), masked)
                acc, top, total, p = lax.optimization_barrier((acc, top, total, p))
                plgpu.barrier_wait(v_full.at[slot])
                hand_over()

                def products(refs):
                    acc_ref, s_ref = refs
                    issue_pv(acc_ref, p, slot)
                    issue_qk(s_ref, done + 1)
                    hand_over()

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, keys), jnp.float32), plgpu.Layout.WGMMA)
                acc, s = self.added(products, acc, zeros)
                plgpu.barrier_arrive(v_free.at[slot])
                plgpu.barrier_arrive(k_free.at[following])
                return s, (acc, top, total), done + 1

            def zeros(shape, layout, value=0.0):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            state = (
                zeros((ROWS, depth), plgpu.Layout.WGMMA),
                zeros((ROWS,), row_layout, -jnp.inf),
                zeros((ROWS,), row_layout),
            )
            carry = s, state, done
            options = self.options
            any_mask = options.causal or self.segments or bool(self.q_shape[1] % keys)
            last = hi - 1
            if self.segments or options.sliding_window is not None:
                carry = lax.fori_loop(lo, jnp.minimum(full_lo, last), partial(one_block, masked=True), carry)
            carry = lax.fori_loop(full_lo, jnp.minimum(full_hi, last), partial(one_block, masked=False), carry)
            if self.segments or options.sliding_window is not None or keys < TILE:
                carry = lax.fori_loop(full_hi, last, partial(one_block, masked=True), carry)
            s, state, done = carry
            if not self.shared:
                plgpu.barrier_arrive(q_free)
            slot = lax.rem(done, stages)
            (acc, top, total), p = soften(s, state, (row, own, last * keys), any_mask)
            plgpu.barrier_wait(v_full.at[slot])
            hand_over()

            def last_product(refs):
                issue_pv(refs[0], p, slot)
                hand_over()

            (acc,) = self.added(last_product, acc)
            plgpu.barrier_arrive(v_free.at[slot])
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem[warpgroup] = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(dtype)
            lse_smem[warpgroup] = jnp.where(empty, 0.0, top * np.float32(1 / LOG2E) + jnp.log(total))
            plgpu.commit_smem()
            rows = pl.ds(own, ROWS)
            plgpu.copy_smem_to_gmem(o_smem.at[warpgroup], out.at[row, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[row, head, rows])
            if self.shared:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free)
            return done + 1

        pl.when(warpgroup == 1)(hand_over)
        lax.fori_loop(0, self.rounds(), one_item, jnp.int32(0))
        pl.when(warpgroup == 0)(hand_over)
        plgpu.wait_smem_to_gmem(0)

    def added(self, products, *accumulators):
        """The accumulators after matrix products into them are done."""
        if not self.interpreted:
            return pl.run_state(products)(tuple(plgpu.ACC.init(a) for a in accumulators))
        from_zero = pl.run_scoped(
            lambda *refs: (products(refs), tuple(r[...] for r in refs))[1],
            *(plgpu.ACC(a.shape, jnp.float32) for a in accumulators),
        )
        return tuple(a + b for a, b in zip(accumulators, from_zero, strict=True))

    def bounded(self, s):
        """s, or tanh(scale s / cap)."""
        if self.options.soft_cap is None:
            return s
        return 1.0 - 2.0 / (1.0 + jnp.exp2(s * np.float32(2 * self.options.scale * LOG2E / self.options.soft_cap)))

    def visible(self, ids, place, row_layout, column_layout):
        """Which of the logits [ROWS, keys] at (row of the batch, first query, first key) count."""
        row, query, key = place
        shape = (ROWS, self.tiles.keys)
        i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + query
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + key
        seen = j < self.q_shape[1]
        if self.options.causal:
            seen = i >= j
        if self.options.sliding_window is not None:
            seen = seen & (i - j < self.options.sliding_window)
        if self.segments:
            of_query = plgpu.load(ids.at[row, pl.ds(query, ROWS)], layout=row_layout, optimized=False)
            of_key = plgpu.load(ids.at[row, pl.ds(key, self.tiles.keys)], layout=column_layout, optimized=False)
            of_query = lax.broadcast_in_dim(of_query, shape, [0])
            seen = seen & (of_query == lax.broadcast_in_dim(of_key, shape, [1])) & (of_query != 0)
        return seen
