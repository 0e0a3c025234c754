"""What the Mosaic GPU kernels of attention share: their work items, their schedules, which logits count.

A program stays on its multiprocessor and takes work items (a tile of TILE queries of one head, or of keys of one
key/value head) in rounds: the tiles with most to visit first, and each round in the opposite direction, which evens the
sums out. Which blocks an item visits comes from a schedule: [first, first without mask, end without mask, end), and
whether those masked for the causal order need no comparison of segments. In whole rows a tile's place says how much it
visits; in packed ones its document does, and the schedule is sorted.
"""

# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false, reportPrivateImportUsage=false
# (refs have .at; pyright takes what jax registers for abstract)
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.flash_attention.segments import GRAIN, KEYS, QUERIES, SegmentMetadata

LOG2E = 1.4426950408889634
WARPGROUPS = 2  # that compute; one more loads
ROWS = 64  # queries or keys of a computing warpgroup
TILE = WARPGROUPS * ROWS
ROW, COLUMN, MATRIX = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Tiles:
    """Positions of the blocks that a work item visits, and how many blocks are in shared memory at a time."""

    step: int
    stages: int

    def __post_init__(self) -> None:
        if self.step not in (64, 128) or self.stages < 2:
            raise ValueError(f"{self}: blocks of 64 or 128 positions, at least 2 stages.")


def obstacle(q: jax.Array, options: Options) -> str | None:
    """Why these kernels cannot serve the call, None where it can."""
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


def schedule(length: int, segments: SegmentMetadata | None, options: Options, step: int, of_keys: bool) -> jax.Array:
    """int32 [B or 1, tiles, 5]: which blocks of keys a tile of queries visits or the reverse (`of_keys`), at least one."""
    tiles = -(-length // TILE)
    own = np.arange(tiles, dtype=np.int32)[None] * TILE
    lo, hi, full_lo, full_hi = 0 * own, 0 * own + length, 0 * own, 0 * own + length
    window = options.sliding_window
    if options.causal and of_keys:
        lo, full_lo = own, own + TILE - 1
        if window is not None:
            hi, full_hi = np.minimum(hi, own + TILE - 1 + window), np.minimum(full_hi, own + window)
    elif options.causal:
        hi, full_hi = np.minimum(hi, own + TILE), np.minimum(full_hi, own + 1)
        if window is not None:
            lo, full_lo = np.maximum(lo, own - window + 1), np.maximum(full_lo, own + TILE - window)
    if segments is not None:
        ranges = segments.ranges[:, KEYS if of_keys else QUERIES, : tiles * (TILE // GRAIN)].reshape(
            -1, tiles, TILE // GRAIN, 4
        )
        lo = jnp.maximum(lo, ranges[..., 0].min(-1))
        hi = jnp.minimum(hi, ranges[..., 1].max(-1))
        run_lo, run_hi = ranges[..., 2].max(-1), ranges[..., 3].min(-1)
        full_lo, full_hi = jnp.maximum(full_lo, run_lo), jnp.minimum(full_hi, run_hi)
    xnp: Any = np if segments is None else jnp
    lo, full_lo, full_hi, hi = lo // step, -(-full_lo // step), full_hi // step, -(-hi // step)
    empty = hi <= lo
    lo, hi = xnp.where(empty, 0, lo), xnp.where(empty, 1, hi)
    none = (full_hi <= full_lo) | empty
    nowhere = hi if of_keys and options.causal else lo  # the one masked part that a causal walk has takes all
    full_lo, full_hi = xnp.where(none, nowhere, full_lo), xnp.where(none, nowhere, full_hi)
    plain = 0 * hi
    if segments is not None:
        first, end = (lo, full_lo) if of_keys else (full_hi, hi)
        plain = ((run_lo <= first * step) & (end * step <= run_hi)).astype(jnp.int32)
    return jnp.asarray(xnp.stack([lo, full_lo, full_hi, hi, plain], axis=-1), jnp.int32)


def flat_plan(plan: jax.Array, segments: SegmentMetadata | None) -> jax.Array:
    """As kernels read it: in order of tiles, or, of packed rows, those with most to visit first, each with its place."""
    if segments is None:
        return plan.reshape(-1)
    plan = plan.reshape(-1, plan.shape[-1])
    order = jnp.argsort(plan[:, 3] - plan[:, 0], descending=True)
    return jnp.concatenate([plan[order], order.astype(jnp.int32)[:, None]], axis=1).reshape(-1)


@dataclass(frozen=True)
class Body:
    """A kernel's constants, and what follows from them."""

    q_shape: tuple[int, ...]
    kv_heads: int
    segments: bool
    options: Options
    tiles: Tiles
    programs: int
    interpreted: bool  # by jax for the CPU, which knows no accumulator with a first value and no operand in registers

    of_keys = False  # whether items are tiles of keys

    @property
    def count(self) -> int:
        """Tiles of a row."""
        return -(-self.q_shape[1] // TILE)

    @property
    def columns(self) -> int:
        return self.q_shape[0] * (self.kv_heads if self.of_keys else self.q_shape[2])

    @property
    def factor(self) -> float:
        """Of x (`bounded`) in log2 of a weight."""
        return LOG2E * (self.options.soft_cap or self.options.scale)

    def rounds(self) -> jax.Array:
        """How many items this program takes."""
        program = lax.axis_index("program")
        full, rest = divmod(self.count * self.columns, self.programs)
        return full + (self.place(full, program) < rest).astype(jnp.int32)

    def place(self, number: Any, program: jax.Array) -> jax.Array:
        """Odd rounds run backwards."""
        return jnp.where(number % 2 == 0, program, self.programs - 1 - program)

    def item(self, number: jax.Array, plan: Any) -> tuple:
        """(row of the batch, head, tile, the five entries of its schedule)."""
        heads = np.int32(self.columns // self.q_shape[0])
        index = number * self.programs + self.place(number, lax.axis_index("program"))
        if self.segments:
            at = lax.div(index, heads) * 6
            entries, place = tuple(plan[at + i] for i in range(5)), plan[at + 5]
            row, tile = lax.div(place, np.int32(self.count)), lax.rem(place, np.int32(self.count))
            return row, lax.rem(index, heads), tile, entries
        tile, column = lax.div(index, np.int32(self.columns)), lax.rem(index, np.int32(self.columns))
        if not self.of_keys:
            tile = self.count - 1 - tile
        row, head = lax.div(column, heads), lax.rem(column, heads)
        return row, head, tile, tuple(plan[tile * 5 + i] for i in range(5))

    def for_items(self, plan: Any, one_item: Callable[..., Any], carry: Any) -> Any:
        """Carry of `one_item(number, item, carry)` over this program's items; each one's schedule is read ahead."""
        rounds = self.rounds()

        def step(number, state):
            item, carry = state
            following = self.item(jnp.minimum(number + 1, rounds - 1), plan)
            return following, one_item(number, item, carry)

        return lax.fori_loop(0, rounds, step, (self.item(jnp.int32(0), plan), carry))[1]

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

    def ids_scratch(self) -> Any:
        """A ring for segment ids of blocks that are masked."""
        if not self.segments:
            return None
        return plgpu.SMEM((self.tiles.stages, self.tiles.step), jnp.int32), ring(self.tiles.stages)

    def load_ids(self, ids, ids_ring, row, block, unmasked, masks):
        """The count `masks` of masked blocks after this one, whose ids are fetched if it is not in the range `unmasked`."""
        if not self.segments:
            return masks
        smem, (full, free) = ids_ring
        stages, step = np.int32(self.tiles.stages), self.tiles.step
        masked, slot = (block < unmasked[0]) | (block >= unmasked[1]), lax.rem(masks, stages)

        @pl.when(masked)
        def _():
            @pl.when(masks >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            others = ids.at[row, QUERIES if self.of_keys else KEYS, pl.ds(block * step, step)]
            plgpu.copy_gmem_to_smem(others, smem.at[slot], full.at[slot])

        return masks + masked.astype(jnp.int32)

    def own_ids(self, ids, row, first):
        """Of the computing warpgroup's positions, in registers."""
        if not self.segments:
            return None
        own = ids.at[row, KEYS if self.of_keys else QUERIES, pl.ds(first, ROWS)]
        return plgpu.load(own, layout=ROW, optimized=False)

    def wait_for_rings(self, rings, done, ids_ring, masks):
        """All blocks given back, so that nothing is pending when the program ends."""
        stages = np.int32(self.tiles.stages)
        pending = [(free, done) for _, free in rings] + ([(ids_ring[1][1], masks)] if self.segments else [])
        for free, count in pending:

            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(block, free=free):
                plgpu.barrier_wait(free.at[lax.rem(block, stages)])

    def masked(self, x, value, mask: "Mask"):
        """x where logits count."""
        if not self.segments:
            return jnp.where(self.visible(mask, x.shape, None), x, value)
        smem, (full, free) = mask.ring
        slot = lax.rem(mask.count, np.int32(self.tiles.stages))
        plgpu.barrier_wait(full.at[slot])

        def choose(compared, x):
            return jnp.where(self.visible(mask, x.shape, smem.at[slot] if compared else None), x, value)

        if mask.plain is None:
            x = choose(True, x)
        else:
            x = lax.cond(mask.plain != 0, partial(choose, False), partial(choose, True), x)
        plgpu.commit_smem()  # read, before the next copy writes there
        plgpu.barrier_arrive(free.at[slot])
        return x

    def visible(self, mask: "Mask", shape, others):
        """Which logits count; `others`: the ids of the block's columns, where segments are compared."""
        i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + mask.own
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) + mask.other
        if self.of_keys:
            i, j = j, i
        seen = j < self.q_shape[1]
        if self.options.causal:
            seen = i >= j
        if self.options.sliding_window is not None:
            seen = seen & (i - j < self.options.sliding_window)
        if others is not None:
            rows = lax.broadcast_in_dim(mask.ids, shape, [0])
            columns = lax.broadcast_in_dim(plgpu.load(others, layout=COLUMN), shape, [1])
            seen = seen & (rows == columns) & (rows != 0)
        return seen


class Mask(NamedTuple):
    """Where a block of logits lies, and what tells which of them count."""

    own: Any  # the first position of its rows
    other: Any  # and of its columns
    ids: Any  # the rows' segment ids
    ring: Any  # the columns', in shared memory
    count: Any  # of masked blocks before this one, which says where in the ring
    plain: Any  # not 0: segments need no look; None: they do


def filled(shape, layout, value=0.0):
    """A float32 array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def ring(stages: int, arrivals: int = 1) -> tuple[plgpu.Barrier, plgpu.Barrier]:
    """Barriers of a ring of buffers: filled by that many copies, given back by each computing warpgroup."""
    return (
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )
