"""The backward pass for Hopper, in Pallas Mosaic GPU: a kernel for dq and one for dk and dv.

Each has a loading and two computing warpgroups, as the forward pass. For dq a computing warpgroup owns 64 queries and
visits blocks of keys; for dk and dv it owns 64 keys and visits blocks of queries of each head of its group, with the
matrices of logits transposed, so that p and ds come out of one product as the left operand of the next, in registers.
Nothing is added in memory: the result does not depend on the order of programs. That costs seven matrix products
instead of the five of a kernel that adds dq atomically.

The two computing warpgroups run freely: one's matrix products hide the other's exponentials.
"""

# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false, reportPrivateImportUsage=false
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
    COLUMN,
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

QUERIES_TILES = {64: Tiles(128, 3), 128: Tiles(64, 3)}
KEYS_TILES = {64: Tiles(64, 4), 128: Tiles(64, 3)}


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: SegmentMetadata | None,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    options: Options,
    queries_tiles: Tiles | None = None,
    keys_tiles: Tiles | None = None,
    programs: int | None = None,
    interpreted: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv; delta [B, N, S] is o.g less lse's cotangent."""
    depth = q.shape[3]
    ids = jnp.zeros((1, 2, 128), jnp.int32) if segments is None else segments.ids
    rest = ((0, 0), (0, 0), (0, -q.shape[1] % TILE))
    statistics = jnp.pad(lse * LOG2E, rest), jnp.pad(delta, rest)  # of whole tiles; in base 2, as exp2 wants it
    arrays = q, k, v, dout, *statistics

    def run(kind, tiles, scratch, out):
        items = -(-q.shape[1] // TILE) * q.shape[0] * (k if kind.of_keys else q).shape[2]
        body = kind(
            q.shape,
            k.shape[2],
            segments is not None,
            options,
            tiles,
            min(programs or multiprocessors(), items),
            interpreted,
        )
        plan = schedule(q.shape[1], segments, options, tiles.step, body.of_keys)
        return plgpu.kernel(
            body,
            out_type=out,
            scratch_types=(*scratch(tiles), body.ids_scratch()),
            grid=(body.programs,),
            grid_names=("program",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            kernel_name=f"flash_attention_{'keys' if body.of_keys else 'queries'}_gradient",
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*arrays, flat_plan(plan, segments), ids)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = partial(plgpu.SMEM, dtype=q.dtype, transforms=transforms)
    own = smem((WARPGROUPS, ROWS, depth))

    def both(tiles):
        """Two arrays that an item owns, one staged on its way out; two rings; their barriers."""
        blocks = smem((tiles.stages, tiles.step, depth))
        free = plgpu.Barrier(num_arrivals=WARPGROUPS)
        weights = smem((WARPGROUPS, ROWS, tiles.step)) if interpreted else None
        return own, own, weights, blocks, blocks, (plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS), free)

    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    (dq,) = run(
        _Queries,
        queries_tiles or choice("flash_attention.mosaic.queries", QUERIES_TILES[depth], depth=depth),
        lambda tiles: (*both(tiles), ring(tiles.stages), ring(tiles.stages)),
        (like_q,),
    )
    dk, dv = run(
        _Keys,
        keys_tiles or choice("flash_attention.mosaic.keys", KEYS_TILES[depth], depth=depth),
        lambda tiles: (
            *both(tiles),
            ring(tiles.stages, 2),
            ring(tiles.stages, 2),
            plgpu.SMEM((tiles.stages, tiles.step), jnp.float32),
            plgpu.SMEM((tiles.stages, tiles.step), jnp.float32),
        ),
        (like_k, like_k),
    )
    return dq, dk, dv


class _Backward(Body):
    """What both kernels do with a block of logits."""

    def weights(self, s, log, axis, mask):
        """p and x of the products s, given log2 of the sums of exponentials along `axis`."""
        x = self.bounded(s)
        p = jnp.exp2(x * self.factor - lax.broadcast_in_dim(log, x.shape, [axis]))
        return (p if mask is None else self.masked(p, 0.0, mask)), x

    def slopes(self, p, x, dp, delta, axis):
        """ds: of logits before the scale."""
        ds = p * (dp - lax.broadcast_in_dim(delta, p.shape, [axis]))
        return ds if self.options.soft_cap is None else ds * (1.0 - x * x)

    def phases(self, plan, body, carry):
        """The walk over a schedule's blocks, masked at both ends."""
        lo, full_lo, full_hi, hi, plain = plan
        options, ends = self.options, self.segments or self.options.sliding_window is not None
        ragged = bool(self.q_shape[1] % self.tiles.step)
        if ends or (options.causal and self.of_keys):
            first = partial(body, masked=True, plain=plain if options.causal and self.of_keys else None)
            carry = lax.fori_loop(lo, full_lo, first, carry)
        carry = lax.fori_loop(full_lo, full_hi, partial(body, masked=False), carry)
        if ends or ragged or (options.causal and not self.of_keys):
            last = partial(body, masked=True, plain=None if self.of_keys or not options.causal else plain)
            carry = lax.fori_loop(full_hi, hi, last, carry)
        return carry

    def split(self, load, compute):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            load()

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            compute(warpgroup)


class _Queries(_Backward):
    """dq."""

    def __call__(
        self,
        q,
        k,
        v,
        do,
        lse,
        delta,
        plan,
        ids,
        dq,
        q_smem,
        do_smem,
        p_smem,
        k_smem,
        v_smem,
        own,
        k_ring,
        v_ring,
        ids_ring,
    ):
        stages, step, depth = np.int32(self.tiles.stages), self.tiles.step, self.q_shape[3]
        own_full, own_free = own

        def load():
            def one_item(number, item, counts):
                row, head, tile, (lo, full_lo, full_hi, hi, _) = item
                kv_head = lax.div(head, np.int32(self.q_shape[2] // self.kv_heads))

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_wait(own_free)

                for w in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q.at[row, rows, head], q_smem.at[w], own_full.at[w])
                    plgpu.copy_gmem_to_smem(do.at[row, rows, head], do_smem.at[w], own_full.at[w])

                def one_block(block, counts):
                    done, masks = counts
                    slot, rows = lax.rem(done, stages), pl.ds(block * step, step)
                    for source, smem, (full, free) in ((k, k_smem, k_ring), (v, v_smem, v_ring)):

                        @pl.when(done >= stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        plgpu.copy_gmem_to_smem(source.at[row, rows, kv_head], smem.at[slot], full.at[slot])
                    return done + 1, self.load_ids(ids, ids_ring, row, block, (full_lo, full_hi), masks)

                return lax.fori_loop(lo, hi, one_block, counts)

            done, masks = self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
            self.wait_for_rings((k_ring, v_ring), done, ids_ring, masks)
            plgpu.barrier_wait(own_free)

        def compute(w):
            (k_full, k_free), (v_full, v_free) = k_ring, v_ring

            def one_item(number, item, counts):
                row, head, tile, blocks = item
                first = tile * TILE + w * ROWS
                own_ids = self.own_ids(ids, row, first)
                log = plgpu.load(lse.at[row, head, pl.ds(first, ROWS)], layout=ROW, optimized=False)
                along = plgpu.load(delta.at[row, head, pl.ds(first, ROWS)], layout=ROW, optimized=False)
                plgpu.barrier_wait(own_full.at[w])

                def one_block(block, carry, masked, plain=None):
                    acc, done, masks = carry
                    slot = lax.rem(done, stages)

                    def products(s_ref, dp_ref):
                        plgpu.barrier_wait(k_full.at[slot])
                        plgpu.wgmma(s_ref, q_smem.at[w], k_smem.at[slot].T)
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.wgmma(dp_ref, do_smem.at[w], v_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        mask = Mask(first, block * step, own_ids, ids_ring, masks, plain) if masked else None
                        p, x = self.weights(s, log, 0, mask)
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                        plgpu.barrier_arrive(v_free.at[slot])
                        return self.slopes(p, x, dp, along, 0).astype(q_smem.dtype)

                    shape = plgpu.ACC((ROWS, step), jnp.float32)
                    ds = pl.run_scoped(products, shape, shape)
                    if self.interpreted:
                        p_smem[w] = ds

                    def product(refs):
                        plgpu.wgmma(refs[0], p_smem.at[w] if self.interpreted else ds, k_smem.at[slot])

                    (acc,) = self.added(product, acc)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return acc, done + 1, masks + 1 if masked else masks

                acc, *counts = self.phases(blocks, one_block, (filled((ROWS, depth), MATRIX), *counts))
                q_smem[w] = (acc * self.options.scale).astype(q_smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[w], dq.at[row, pl.ds(first, ROWS), head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free)
                return tuple(counts)

            self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

        self.split(load, compute)


class _Keys(_Backward):
    """dk and dv."""

    of_keys = True

    def __call__(
        self, q, k, v, do, lse, delta, plan, ids, dk, dv,
        k_smem, v_smem, p_smem, q_smem, do_smem, own, q_ring, do_ring, lse_smem, delta_smem, ids_ring,
    ):  # fmt: skip
        stages, step, depth = np.int32(self.tiles.stages), self.tiles.step, self.q_shape[3]
        group = self.q_shape[2] // self.kv_heads
        own_full, own_free = own
        rings = (q, q_smem, lse, lse_smem, q_ring), (do, do_smem, delta, delta_smem, do_ring)

        def load():
            def one_item(number, item, counts):
                row, kv_head, tile, (lo, full_lo, full_hi, hi, _) = item

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_wait(own_free)

                for w in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k.at[row, rows, kv_head], k_smem.at[w], own_full.at[w])
                    plgpu.copy_gmem_to_smem(v.at[row, rows, kv_head], v_smem.at[w], own_full.at[w])

                def one_head(member, counts):
                    head = kv_head * group + member

                    def one_block(block, counts):
                        done, masks = counts
                        slot, rows = lax.rem(done, stages), pl.ds(block * step, step)
                        for source, smem, per_row, row_smem, (full, free) in rings:

                            @pl.when(done >= stages)
                            def _(free=free):
                                plgpu.barrier_wait(free.at[slot])

                            plgpu.copy_gmem_to_smem(source.at[row, rows, head], smem.at[slot], full.at[slot])
                            plgpu.copy_gmem_to_smem(per_row.at[row, head, rows], row_smem.at[slot], full.at[slot])
                        return done + 1, self.load_ids(ids, ids_ring, row, block, (full_lo, full_hi), masks)

                    return lax.fori_loop(lo, hi, one_block, counts)

                return lax.fori_loop(0, group, one_head, counts)

            done, masks = self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
            self.wait_for_rings((q_ring, do_ring), done, ids_ring, masks)
            plgpu.barrier_wait(own_free)

        def compute(w):
            (q_full, q_free), (do_full, do_free) = q_ring, do_ring
            dtype = k_smem.dtype

            def one_item(number, item, counts):
                row, kv_head, tile, blocks = item
                first = tile * TILE + w * ROWS
                own_ids = self.own_ids(ids, row, first)
                plgpu.barrier_wait(own_full.at[w])

                def one_block(block, carry, masked, plain=None):
                    dk_acc, dv_acc, done, masks = carry
                    slot = lax.rem(done, stages)

                    def products(s_ref, dp_ref):
                        plgpu.barrier_wait(q_full.at[slot])
                        plgpu.wgmma(s_ref, k_smem.at[w], q_smem.at[slot].T)
                        plgpu.barrier_wait(do_full.at[slot])
                        plgpu.wgmma(dp_ref, v_smem.at[w], do_smem.at[slot].T)
                        log = plgpu.load(lse_smem.at[slot], layout=COLUMN)
                        along = plgpu.load(delta_smem.at[slot], layout=COLUMN)
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        mask = Mask(first, block * step, own_ids, ids_ring, masks, plain) if masked else None
                        p, x = self.weights(s, log, 1, mask)
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                        return p.astype(dtype), self.slopes(p, x, dp, along, 1).astype(dtype)

                    shape = plgpu.ACC((ROWS, step), jnp.float32)
                    p, ds = pl.run_scoped(products, shape, shape)
                    if self.interpreted:
                        dv_acc, dk_acc = self.one_by_one(((dv_acc, p, do_smem), (dk_acc, ds, q_smem)), p_smem, w, slot)
                    else:

                        def last_products(refs):
                            plgpu.wgmma(refs[0], p, do_smem.at[slot])
                            plgpu.wgmma(refs[1], ds, q_smem.at[slot])

                        dv_acc, dk_acc = self.added(last_products, dv_acc, dk_acc)
                    plgpu.barrier_arrive(do_free.at[slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    return dk_acc, dv_acc, done + 1, masks + 1 if masked else masks

                zeros = filled((ROWS, depth), MATRIX)

                def one_head(_, carry):
                    return self.phases(blocks, one_block, carry)

                dk_acc, dv_acc, *counts = lax.fori_loop(0, group, one_head, (zeros, zeros, *counts))
                k_smem[w] = (dk_acc * self.options.scale).astype(dtype)
                v_smem[w] = dv_acc.astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(first, ROWS)
                plgpu.copy_smem_to_gmem(k_smem.at[w], dk.at[row, rows, kv_head])
                plgpu.copy_smem_to_gmem(v_smem.at[w], dv.at[row, rows, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free)
                return tuple(counts)

            self.for_items(plan, one_item, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

        self.split(load, compute)

    def one_by_one(self, products, p_smem, w, slot):
        """Accumulators after products whose left operands go through shared memory: for the interpreter."""
        results = []
        for acc, left, right in products:
            p_smem[w] = left
            results += self.added(lambda refs, right=right: plgpu.wgmma(refs[0], p_smem.at[w], right.at[slot]), acc)
        return results
