"""The forward pass for Hopper, in Pallas Mosaic GPU: three warpgroups, one loads, two compute 64 queries each.

While the computing warpgroups finish a work item, the loading one already fetches the next: its queries, and blocks of
keys and values through a ring. The computing warpgroups take turns on the tensor cores. One's turn is o += p_j v_j and
s = q k_{j+1}^T, both only issued; while they run, the other makes p of its s. Each has a barrier at which the other says
that it is its turn, which keeps them half a step apart.
"""

# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false
# (refs have .at; pyright takes what jax registers for abstract)
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import multiprocessors
from pallas_kernels.flash_attention.mosaic_common import (
    LOG2E,
    MATRIX,
    ROW,
    ROWS,
    TILE,
    WARPGROUPS,
    Body,
    Mask,
    Tiles,
    filled,
    flat_plan,
    ring,
    schedule,
)
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.flash_attention.segments import SegmentMetadata
from pallas_kernels.tuning import choice


def default_tiles(depth: int) -> Tiles:
    """As measured, or what 227 KB hold beside queries and outputs."""
    fitting = {64: Tiles(128, 4), 128: Tiles(128, 2), 192: Tiles(64, 2), 256: Tiles(64, 2)}[depth]
    return choice("flash_attention.mosaic.forward", fitting, depth=depth)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: SegmentMetadata | None,
    options: Options,
    tiles: Tiles | None = None,
    programs: int | None = None,
    interpreted: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out [B, S, N, D] and lse [B, N, S]."""
    batch, length, heads, depth = q.shape
    tiles = tiles or default_tiles(depth)
    count = -(-length // TILE)
    items = batch * heads * count
    plan = schedule(length, segments, options, tiles.step, of_keys=False)
    ids = jnp.zeros((1, 2, 128), jnp.int32) if segments is None else segments.ids
    kernel = _Forward(
        q.shape,
        k.shape[2],
        segments is not None,
        options,
        tiles,
        min(programs or multiprocessors(), items),
        interpreted,
    )
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
            smem((WARPGROUPS, ROWS, tiles.step)) if interpreted else None,
            smem((tiles.stages, tiles.step, depth)),
            smem((tiles.stages, tiles.step, depth)),
            (plgpu.Barrier(num_barriers=WARPGROUPS), plgpu.Barrier(num_arrivals=WARPGROUPS)),
            ring(tiles.stages),
            ring(tiles.stages),
            kernel.ids_scratch(),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ),
        grid=(kernel.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, flat_plan(plan, segments), ids)
    return out, lse[..., :length]


class _Forward(Body):
    @property
    def shared(self) -> bool:
        """Whether outputs take their queries' place, where there is no room for both."""
        return self.q_shape[3] > 192

    def __call__(self, q, k, v, plan, ids, out, lse, *scratch):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.load(q, k, v, plan, ids, *scratch)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.compute(warpgroup, plan, ids, out, lse, *scratch)

    # the loading warpgroup

    def load(self, q, k, v, plan, ids, q_smem, _o, _lse, _p, k_smem, v_smem, qb, kb, vb, ids_ring, _turn):
        stages, keys = np.int32(self.tiles.stages), self.tiles.step
        (q_full, q_free), (k_full, k_free), (v_full, v_free) = qb, kb, vb

        def one_item(number, item, counts):
            row, head, tile, (lo, full_lo, full_hi, hi, _) = item
            kv_head = lax.div(head, np.int32(self.q_shape[2] // self.kv_heads))

            @pl.when(number > 0)
            def _():
                plgpu.barrier_wait(q_free)

            for w in range(WARPGROUPS):
                rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q.at[row, rows, head], q_smem.at[w], q_full.at[w])

            def one_block(block, counts):
                done, masks = counts
                slot = lax.rem(done, stages)
                rows = pl.ds(block * keys, keys)
                for source, smem, full, free in ((k, k_smem, k_full, k_free), (v, v_smem, v_full, v_free)):

                    @pl.when(done >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(source.at[row, rows, kv_head], smem.at[slot], full.at[slot])
                unmasked = full_lo, jnp.minimum(full_hi, hi - 1)
                return done + 1, self.load_ids(ids, ids_ring, row, block, unmasked, masks)

            return lax.fori_loop(lo, hi, one_block, counts)

        done, masks = self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
        self.wait_for_rings((kb, vb), done, ids_ring, masks)
        plgpu.barrier_wait(q_free)

    # the computing warpgroups

    def compute(
        self, warpgroup, plan, ids, out, lse,
        q_smem, o_smem, lse_smem, p_smem, k_smem, v_smem, qb, kb, vb, ids_ring, turn,
    ):  # fmt: skip
        (q_full, q_free), (k_full, k_free), (v_full, v_free) = qb, kb, vb
        stages, keys, depth = np.int32(self.tiles.stages), self.tiles.step, self.q_shape[3]
        dtype = q_smem.dtype
        q_own = q_smem.at[warpgroup]
        o_smem = q_smem if self.shared else o_smem

        def take_turn():
            plgpu.barrier_wait(turn.at[warpgroup])

        def hand_over():
            plgpu.barrier_arrive(turn.at[1 - warpgroup])

        def issue_pv(acc, p, slot):
            plgpu.wgmma(acc, p_smem.at[warpgroup] if self.interpreted else p, v_smem.at[slot])

        def issue_qk(s, done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.wgmma(s, q_own, k_smem.at[slot].T)

        def soften(s, state, mask):
            """State after the logits s of a block, and its weights in 16 bits."""
            acc, top, total = state
            x = self.bounded(s)
            if mask is not None:
                x = self.masked(x, -jnp.inf, mask)
            higher = jnp.maximum(top, x.max(axis=1) * self.factor)
            shift = higher if mask is None else jnp.where(higher == -jnp.inf, 0.0, higher)
            p = jnp.exp2(x * self.factor - lax.broadcast_in_dim(shift, x.shape, [0]))
            shrink = jnp.exp2(top - shift)
            total = total * shrink + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            p = p.astype(dtype)
            if self.interpreted:
                p_smem[warpgroup] = p
            return (acc, higher, total), p

        def one_item(number, item, counts):
            row, head, tile, (lo, full_lo, full_hi, hi, plain) = item
            done, masks = counts
            own = tile * TILE + warpgroup * ROWS
            own_ids = self.own_ids(ids, row, own)
            plgpu.barrier_wait(q_full.at[warpgroup])
            take_turn()

            def first(s):
                issue_qk(s, done)
                hand_over()
                return s[...]

            s = pl.run_scoped(first, plgpu.ACC((ROWS, keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[lax.rem(done, stages)])

            def one_block(block, carry, masked, plain=None):
                s, state, done, masks = carry
                slot, following = lax.rem(done, stages), lax.rem(done + 1, stages)
                mask = Mask(own, block * keys, own_ids, ids_ring, masks, plain) if masked else None
                (acc, top, total), p = soften(s, state, mask)
                acc, top, total, p = lax.optimization_barrier((acc, top, total, p))
                plgpu.barrier_wait(v_full.at[slot])
                take_turn()

                def products(refs):
                    acc_ref, s_ref = refs
                    issue_pv(acc_ref, p, slot)
                    issue_qk(s_ref, done + 1)
                    hand_over()

                acc, s = self.added(products, acc, filled((ROWS, keys), MATRIX))
                plgpu.barrier_arrive(v_free.at[slot])
                plgpu.barrier_arrive(k_free.at[following])
                return s, (acc, top, total), done + 1, masks + 1 if masked else masks

            state = filled((ROWS, depth), MATRIX), filled((ROWS,), ROW, -jnp.inf), filled((ROWS,), ROW)
            carry = s, state, done, masks
            options = self.options
            any_mask = options.causal or self.segments or bool(self.q_shape[1] % keys)
            last = hi - 1
            if self.segments or options.sliding_window is not None:
                carry = lax.fori_loop(lo, jnp.minimum(full_lo, last), partial(one_block, masked=True), carry)
            carry = lax.fori_loop(full_lo, jnp.minimum(full_hi, last), partial(one_block, masked=False), carry)
            if self.segments or options.sliding_window is not None or keys < TILE:
                body = partial(one_block, masked=True, plain=plain if options.causal else None)
                carry = lax.fori_loop(full_hi, last, body, carry)
            s, state, done, masks = carry
            if not self.shared:
                plgpu.barrier_arrive(q_free)
            slot = lax.rem(done, stages)
            mask = Mask(own, last * keys, own_ids, ids_ring, masks, plain if options.causal else None)
            (acc, top, total), p = soften(s, state, mask if any_mask else None)
            plgpu.barrier_wait(v_full.at[slot])
            take_turn()

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
            return done + 1, masks + 1

        pl.when(warpgroup == 1)(hand_over)
        self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
        pl.when(warpgroup == 0)(take_turn)
        plgpu.wait_smem_to_gmem(0)
