"""x W^T with a packed W for Hopper, in Pallas Mosaic GPU: codes become the left operand of wgmma in registers.

One warpgroup loads, two compute 64 rows of W each, as y^T = W x^T. In the order in which codes lie (array.py), what a
thread wants of one block of 64 columns are eight pairs of bytes, whose low nibbles are its part of one 64x16 operand and
whose high nibbles are that of another: nothing is shuffled. While wgmma multiplies one step's weights, the next step's
are decoded; a byte of the tile of x is read by both warpgroups, one of the codes by one.

A level is looked up among the bytes of eight registers (registers.py), in 16 bits, and multiplied by its block's scale,
which comes as a sum of two 16-bit numbers, rounding once. Columns of x beyond W's meet `beside`, which is not packed.
"""

# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false
# (refs have .at; pyright takes what jax registers for abstract)
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.nf4.array import NF4Array, NF4Slice
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS
from pallas_kernels.nf4.fused import parts_of
from pallas_kernels.nf4.registers import decode, decoded

ROWS = 64  # of W, for a computing warpgroup
GROUP = 16  # tiles of tokens that are visited before the next rows of W


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a work item; blocks of 64 columns a step; steps in shared memory; parts of a sum."""

    tokens: int
    blocks: int = 1
    stages: int = 4
    splits: int = 1
    ahead: bool = False
    turns: bool = False
    warpgroups: int = 2  # that compute; one more loads

    def __post_init__(self) -> None:
        if self.tokens not in (16, 32, 64, 128, 256) or self.blocks not in (1, 2, 4):
            raise ValueError(f"{self}: tokens must be 16, 32, 64, 128 or 256, and blocks 1, 2 or 4.")
        if self.stages < 2 or self.splits < 1:
            raise ValueError(f"{self}: at least 2 stages and 1 split.")


def product(
    x: Float[Array, "T in+room"],
    q: NF4Array | NF4Slice,
    beside: Float[Array, "out room"] | None,
    *,
    tiles: Tiles,
    programs: int,
    interpreted: bool = False,
) -> Float[Array, "T out"]:
    """x [W beside]^T in x's dtype; T is a multiple of 8, out of 128."""
    (tokens, columns), (out, width) = x.shape, q.shape
    codes, scales, index = parts_of(q)
    kernel = _Product(tokens, out, width, columns, codes.ndim == 3, x.dtype, min(programs, 1 << 30), tiles, interpreted)
    if beside is None:
        beside = jnp.zeros((8, 64), x.dtype)
    step, matrix = BLOCK * tiles.blocks, partial(_matrix, dtype=x.dtype)
    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, tokens, out), kernel.out_dtype),
        scratch_types=(
            matrix((tiles.stages, tiles.tokens, step)),
            plgpu.SMEM((tiles.stages, kernel.rows, step // 2), jnp.uint8, transforms=kernel.code_transforms),
            plgpu.SMEM((tiles.stages, tiles.blocks, kernel.rows), jnp.float32),
            matrix((kernel.rows, step)) if kernel.dense else None,
            _matrix((tiles.warpgroups, 2, kernel.piece, ROWS), kernel.out_dtype),
            matrix((tiles.warpgroups, ROWS, step)) if interpreted else None,
            _ring(tiles),
            plgpu.Barrier(num_arrivals=tiles.warpgroups),
            plgpu.Barrier(num_barriers=tiles.warpgroups),
            plgpu.SMEM((16,), jnp.float32),
            plgpu.Barrier(),
        ),
        grid=(min(programs, kernel.items),),
        grid_names=("program",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="nf4_matmul",
    )(x, codes, scales.T, beside, index, jnp.asarray(NF4_LEVELS))
    return parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(x.dtype)


def _matrix(shape, dtype):
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


def _ring(tiles):
    """Barriers of a ring of buffers: filled by three copies, given back by each computing warpgroup."""
    return (
        plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
    )


@dataclasses.dataclass(frozen=True)
class _Product:
    tokens: int
    out: int
    width: int
    columns: int  # of x: W's and those beside
    stacked: bool
    dtype: Any
    programs: int
    tiles: Tiles
    interpreted: bool

    @property
    def rows(self) -> int:
        """Of W, of a work item."""
        return ROWS * self.tiles.warpgroups

    @property
    def step(self) -> int:
        return BLOCK * self.tiles.blocks

    @property
    def code_transforms(self) -> tuple:
        return (plgpu.TilingTransform((8, self.step // 2)), plgpu.SwizzleTransform(self.step // 2))

    @property
    def packed(self) -> int:
        """Steps over packed columns."""
        return -(-self.width // self.step)

    @property
    def dense(self) -> int:
        """Steps over what is beside."""
        return -(-(self.columns - self.width) // self.step)

    @property
    def piece(self) -> int:
        """Tokens that are written at a time, so that there is room for two such pieces of each warpgroup."""
        return min(self.tiles.tokens, 256 // self.tiles.warpgroups // self.out_dtype.itemsize)

    @property
    def out_dtype(self):
        return jnp.dtype(jnp.float32) if self.tiles.splits > 1 else self.dtype

    @property
    def of_tokens(self) -> int:
        """Tiles of tokens."""
        return -(-self.tokens // self.tiles.tokens)

    @property
    def items(self) -> int:
        return self.of_tokens * (self.out // self.rows) * self.tiles.splits

    def item(self, number):
        """(first token, first row, part of the sum, its steps: the first, the first dense, the end)."""
        splits = self.tiles.splits
        group, rest = _divide(number, min(GROUP, self.of_tokens) * (self.out // self.rows) * splits)
        group = group * min(GROUP, self.of_tokens)
        height = jnp.minimum(min(GROUP, self.of_tokens), self.of_tokens - group)
        token = group + lax.rem(rest, height)
        row, part = _divide(lax.div(rest, height), splits)
        lo, hi = (lax.div(end * self.packed, np.int32(splits)) for end in (part, part + 1))
        return token * self.tiles.tokens, row * self.rows, part, lo, hi, jnp.where(part == splits - 1, hi + self.dense, hi)

    def for_items(self, one_item, done):
        """`done` counts steps, of which each takes the next buffers of the ring."""
        program = lax.axis_index("program")
        rounds = lax.div(self.items - 1 - program, np.int32(self.programs)) + 1

        def one(number, done):
            return one_item(self.item(number * self.programs + program), done)

        return lax.fori_loop(0, rounds, one, done)

    def __call__(self, x, codes, scales, beside, index, levels, out, x_smem, codes_smem, scales_smem, beside_smem, out_smem, a_smem, ring, beside_free, turn, levels_smem, levels_full):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == self.tiles.warpgroups)
        def _():
            plgpu.set_max_registers({2: 40, 4: 24}[self.tiles.warpgroups], action="decrease")
            plgpu.copy_gmem_to_smem(levels, levels_smem, levels_full)
            own = codes.at[index[0]] if self.stacked else codes
            self.load(x, own, scales, beside, x_smem, codes_smem, scales_smem, beside_smem, ring, beside_free)

        @pl.when(warpgroup < self.tiles.warpgroups)
        def _():
            plgpu.set_max_registers({2: 232, 4: 112}[self.tiles.warpgroups], action="increase")
            plgpu.barrier_wait(levels_full)
            self.compute(levels_smem, out, x_smem, codes_smem, scales_smem, beside_smem, out_smem, a_smem, ring, beside_free, turn, warpgroup)

    def load(self, x, codes, scales, beside, x_smem, codes_smem, scales_smem, beside_smem, ring, beside_free):
        full, free = ring
        stages, step, blocks = np.int32(self.tiles.stages), self.step, self.tiles.blocks

        def one_item(item, counts):
            token, row, _, lo, middle, hi = item
            rows, tokens = pl.ds(row, self.rows), pl.ds(token, self.tiles.tokens)

            def take(first_column, done):
                slot = lax.rem(done, stages)

                @pl.when(done >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(x.at[tokens, pl.ds(first_column, step)], x_smem.at[slot], full.at[slot])
                return slot

            def packed_step(i, done):
                slot = take(i * step, done)
                columns = pl.ds(i * (step // 2), step // 2)
                plgpu.copy_gmem_to_smem(codes.at[rows, columns], codes_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(scales.at[pl.ds(i * blocks, blocks), rows], scales_smem.at[slot], full.at[slot])
                return done + 1

            def dense_step(i, counts):
                done, dense = counts
                first = (i - self.packed) * step
                slot = take(self.width + first, done)

                @pl.when(dense > 0)
                def _():
                    plgpu.barrier_wait(beside_free)

                columns, half = pl.ds(first, step), self.rows // 2
                for i in range(2):  # as many copies as of a packed step
                    own = pl.ds(row + i * half, half), columns
                    plgpu.copy_gmem_to_smem(beside.at[own], beside_smem.at[pl.ds(i * half, half)], full.at[slot])
                return done + 1, dense + 1

            done, dense = counts
            done = lax.fori_loop(lo, middle, packed_step, done)
            return lax.fori_loop(middle, hi, dense_step, (done, dense)) if self.dense else (done, dense)

        done, dense = self.for_items(one_item, (jnp.int32(0), jnp.int32(0)))

        @pl.loop(jnp.maximum(done - stages, 0), done)
        def _(i):
            plgpu.barrier_wait(free.at[lax.rem(i, stages)])

        if self.dense:
            pl.when(dense > 0)(lambda: plgpu.barrier_wait(beside_free))

    def compute(self, levels_smem, out, x_smem, codes_smem, scales_smem, beside_smem, out_smem, a_smem, ring, beside_free, turn, warpgroup):
        full, free = ring
        stages, own = np.int32(self.tiles.stages), pl.ds(warpgroup * ROWS, ROWS)

        def weights(done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(full.at[slot])
            codes, scales = codes_smem.at[slot, own], scales_smem.at[slot, :, own]
            if self.interpreted:
                return decoded(codes[...], scales[...])
            return decode(codes, scales, levels_smem, transforms=self.code_transforms, pitch=self.rows)

        def multiply(acc, a, done):
            if self.interpreted and isinstance(a, jax.Array):
                a_smem[warpgroup] = a
                a = a_smem.at[warpgroup]
            if self.tiles.turns:
                plgpu.barrier_wait(turn.at[warpgroup])
            plgpu.wgmma(acc, a, x_smem.at[lax.rem(done, stages)].T)
            if self.tiles.turns:
                plgpu.barrier_arrive(turn.at[1 - warpgroup])

        def release(done):
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[lax.rem(done, stages)])

        def one_item(item, done):
            token, row, part, lo, middle, hi = item

            def summed(acc):
                def packed_step(_, carry):
                    a, done = carry
                    multiply(acc, a, done)
                    following = lax.optimization_barrier(weights(done + 1))
                    release(done)
                    return following.astype(self.dtype), done + 1

                def packed_step_alone(_, done):
                    multiply(acc, weights(done).astype(self.dtype), done)
                    release(done)
                    return done + 1

                def dense_step(_, done):
                    slot = lax.rem(done, stages)
                    plgpu.barrier_wait(full.at[slot])
                    multiply(acc, beside_smem.at[own], done)
                    release(done)
                    plgpu.barrier_arrive(beside_free)
                    return done + 1

                if self.tiles.ahead:
                    a, end = lax.fori_loop(lo, middle - 1, packed_step, (weights(done).astype(self.dtype), done))
                    multiply(acc, a, end)
                    release(end)
                    end = end + 1
                else:
                    end = lax.fori_loop(lo, middle, packed_step_alone, done)
                if self.dense:
                    end = lax.fori_loop(middle, hi, dense_step, end)
                return acc[...], end

            y, done = pl.run_scoped(summed, plgpu.ACC((ROWS, self.tiles.tokens), jnp.float32))
            for i in range(self.tiles.tokens // self.piece):
                tokens = slice(i * self.piece, (i + 1) * self.piece)
                target = out_smem.at[warpgroup, i % 2]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                target.T[...] = plgpu.layout_cast(y[:, tokens].astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                place = pl.ds(token + i * self.piece, self.piece), pl.ds(row + warpgroup * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(target, out.at[(part, *place)])
            return done

        if self.tiles.turns:
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        self.for_items(one_item, jnp.int32(0))
        if self.tiles.turns:
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
        plgpu.wait_smem_to_gmem(0)


def _divide(number, by):
    return lax.div(number, np.int32(by)), lax.rem(number, np.int32(by))
