"""x W^T with a packed W for Hopper, in Pallas Mosaic GPU: codes become the left operand of wgmma in registers.

One warpgroup loads, two compute 64 rows of W each, as y^T = W x^T. In the order in which codes lie (array.py), what a
thread wants of one block of 64 columns are eight pairs of bytes, whose low nibbles are its part of one 64x16 operand and
whose high nibbles are that of another: nothing is shuffled. Weights are those of unpacking to x's dtype, to the bit
(registers.py). While wgmma multiplies one step's weights, the next step's are decoded, in float32; they are rounded into
the operand's registers once those are free, which the compiler would else see to by waiting before it decodes. Columns of
x beyond W's meet `beside`, which is not packed.

With 4096 tokens the tensor cores of an H200 are busy for 83 % of the time, as was profiled with levels of 16 bits; with
float32 ones it takes as long. What decodes beside them issues an instruction in about three cycles in each quarter of a
multiprocessor, perhaps as wgmma's sums are read and written in the same registers: a dense product has nothing to run there.
bench/results/h200/trials.json has the figures and what was tried.
"""

# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false, reportCallIssue=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# (refs have .at; pyright takes what jax registers for abstract)
import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import cuda_capability, multiprocessors
from pallas_kernels.nf4.array import NF4Array, NF4Slice
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS
from pallas_kernels.nf4.dequantize import block_scales
from pallas_kernels.nf4.registers import decode, decoded
from pallas_kernels.tuning import bucket, choice

WARPGROUPS = 2  # that compute; one more loads
ROWS = 64  # of W, for a computing warpgroup
TILE = WARPGROUPS * ROWS
GROUP = 16  # tiles of tokens that are visited before the next rows of W


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a work item; blocks of 64 columns a step; steps in shared memory; parts of a sum."""

    tokens: int
    blocks: int = 1
    stages: int = 4
    splits: int = 1

    def __post_init__(self) -> None:
        if self.tokens not in (16, 32, 64, 128, 256) or self.blocks not in (1, 2):
            raise ValueError(f"{self}: tokens must be 16, 32, 64, 128 or 256, and blocks 1 or 2.")
        if self.stages < 2 or not 1 <= self.splits <= 16:
            raise ValueError(f"{self}: at least 2 stages, and 1 to 16 splits.")


def default_tiles(tokens: int, out: int, width: int, programs: int) -> Tiles:
    """What 227 KB hold beside LoRA's factor and pieces of the result; parts of sums where there are few rows of W."""
    wide = min(256, bucket(tokens))
    fitting = {256: Tiles(256), 128: Tiles(128, blocks=2, stages=3)}.get(wide, Tiles(wide, blocks=2))
    if width % (BLOCK * fitting.blocks):
        fitting = Tiles(wide)
    items = -(-tokens // wide) * (out // TILE)
    splits = max(1, min(8, programs // items, width // BLOCK // 8))
    return dataclasses.replace(fitting, splits=splits)


def obstacle(x: jax.Array, slices: Sequence[NF4Slice]) -> str | None:
    """Why the kernel cannot multiply these here, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {x.dtype}"
    if any(one.stack.layout != "rows" for one in slices):
        return f"it takes layout 'rows', whose width is a multiple of {BLOCK}"
    heights = [one.shape[0] for one in slices]
    if any(height % TILE for height in heights):
        return f"it takes weights of a multiple of {TILE} rows, not {heights}"
    if x.size == 0:
        return "it takes at least one row"
    if (capability := cuda_capability()) is None or capability[0] != 9:
        return "it needs a Hopper GPU (compute capability 9.0) as jax's default device"
    return None


def product(
    x: Float[Array, "T in+room"],
    slices: Sequence[NF4Slice],
    beside: Float[Array, "*L out room"] | None = None,
    *,
    scales: Sequence[Float[Array, "L in/64 out_i"]] | None = None,
    tiles: Tiles | None = None,
    programs: int | None = None,
    interpreted: bool = False,
) -> Float[Array, "T out"]:
    """x [W beside]^T in x's dtype; W's parts, of one index, are multiples of 128 rows. None is cut out of its stack.

    `scales` are `scale_columns` of the stacks, where they are there already, and `beside` may be a stack too.
    """
    tokens, columns = x.shape
    x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))  # to whole rows of a tile in shared memory
    heights, width = [one.shape[0] for one in slices], slices[0].shape[1]
    programs = programs or multiprocessors()
    if tiles is None:
        default = default_tiles(tokens, sum(heights), width, programs)
        shape = {"tokens": bucket(tokens), "out": sum(heights), "width": width}
        tiles = choice("nf4_matmul.mosaic", default, **shape)
    if width % (BLOCK * tiles.blocks):
        raise ValueError(f"{tiles} do not divide a weight of {width} columns: its blocks go in whole steps.")
    kernel = _Product(x.shape[0], tuple(heights), width, columns, x.dtype, programs, tiles, interpreted)
    step, matrix = BLOCK * tiles.blocks, partial(_matrix, dtype=x.dtype)
    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, x.shape[0], sum(heights)), kernel.out_dtype),
        scratch_types=(
            (  # a ring, filled by three copies, given back by each computing warpgroup
                matrix((tiles.stages, tiles.tokens, step)),
                plgpu.SMEM((tiles.stages, TILE, step // 2), jnp.uint8, transforms=kernel.code_transforms),
                plgpu.SMEM((tiles.stages, tiles.blocks, TILE), jnp.float32),
                plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
            ),
            (matrix((TILE, step)), plgpu.Barrier(num_arrivals=WARPGROUPS)) if kernel.dense else None,
            (plgpu.SMEM((16,), jnp.float32), plgpu.Barrier()),
            _matrix((WARPGROUPS, 2, kernel.piece, ROWS), kernel.out_dtype),
            matrix((WARPGROUPS, ROWS, step)) if interpreted else None,
        ),
        grid=(min(programs, kernel.items),),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="nf4_matmul",
    )(
        x,
        [one.stack.codes for one in slices],
        scales or [scale_columns(_own_scales(one)) for one in slices],
        jnp.zeros((8, 64), x.dtype) if beside is None else beside,
        slices[0].index[None],
        jnp.asarray(NF4_LEVELS),
    )
    y = parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(x.dtype)
    return y[:tokens]


def scale_columns(q: NF4Array) -> Float[Array, "*L in/64 out"]:
    """The scales of all blocks in float32, as the kernel reads them."""
    return block_scales(q).swapaxes(-1, -2)


def _own_scales(one: NF4Slice) -> Any:
    """The matrix with its stack's codes, which are not cut out."""
    names = [name for name in ("scales", "nested_scales", "offset") if getattr(one.stack, name) is not None]
    return dataclasses.replace(one.stack, **{name: getattr(one.stack, name)[one.index] for name in names})


def _matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


@dataclasses.dataclass(frozen=True)
class _Product:
    tokens: int
    heights: tuple[int, ...]  # of W's parts
    width: int
    columns: int  # of x: W's and those beside
    dtype: Any
    programs: int
    tiles: Tiles
    interpreted: bool  # by jax for the CPU, which knows no operand in registers

    @property
    def step(self) -> int:
        return BLOCK * self.tiles.blocks

    @property
    def code_transforms(self) -> tuple:
        return (plgpu.TilingTransform((8, self.step // 2)), plgpu.SwizzleTransform(self.step // 2))

    @property
    def packed(self) -> int:
        """Steps over packed columns."""
        return self.width // self.step

    @property
    def dense(self) -> int:
        """Steps over what is beside."""
        return -(-(self.columns - self.width) // self.step)

    @property
    def out_dtype(self) -> Any:
        return jnp.dtype(jnp.float32) if self.tiles.splits > 1 else self.dtype

    @property
    def piece(self) -> int:
        """Tokens that are written at a time: each warpgroup has room for two such pieces."""
        return min(self.tiles.tokens, 128 // self.out_dtype.itemsize)

    @property
    def of_tokens(self) -> int:
        """Tiles of tokens."""
        return -(-self.tokens // self.tiles.tokens)

    @property
    def of_rows(self) -> int:
        """Tiles of W's rows."""
        return sum(self.heights) // TILE

    @property
    def items(self) -> int:
        return self.of_tokens * self.of_rows * self.tiles.splits

    def item(self, number):
        """(first token, first row, part of the sum, its steps: the first, the first dense, the end)."""
        splits, most = self.tiles.splits, min(GROUP, self.of_tokens)
        group, rest = _divide(number, most * self.of_rows * splits)
        height = jnp.minimum(most, self.of_tokens - group * most)
        token = group * most + lax.rem(rest, height)
        row, part = _divide(lax.div(rest, height), splits)
        lo, hi = (lax.div(end * self.packed, np.int32(splits)) for end in (part, part + 1))
        return token * self.tiles.tokens, row * TILE, part, lo, hi, jnp.where(part == splits - 1, hi + self.dense, hi)

    def for_items(self, one_item, carry):
        program = lax.axis_index("program")
        rounds = lax.div(self.items - 1 - program, np.int32(self.programs)) + 1
        return lax.fori_loop(0, rounds, lambda i, c: one_item(self.item(i * self.programs + program), c), carry)

    def __call__(
        self, x, codes, scales, beside, index, levels, out, ring, beside_buffer, levels_buffer, out_smem, a_smem
    ):
        warpgroup = lax.axis_index("warpgroup")
        levels_smem, levels_full = levels_buffer

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(levels, levels_smem, levels_full)

            def own(ref):
                return ref.at[index[0]] if len(ref.shape) == 3 else ref

            self.load(
                x, [own(each) for each in codes], [own(each) for each in scales], own(beside), ring, beside_buffer
            )

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(levels_full)
            self.compute(out, ring, beside_buffer, levels_smem, out_smem, a_smem, warpgroup)

    def load(self, x, codes, scales, beside, ring, beside_buffer):
        x_smem, codes_smem, scales_smem, full, free = ring
        beside_smem, beside_free = beside_buffer or (None, None)
        stages, step, blocks = np.int32(self.tiles.stages), self.step, self.tiles.blocks
        ends = list(itertools.accumulate(self.heights))

        def one_item(item, counts):
            token, row, _, lo, middle, hi = item
            tokens = pl.ds(token, self.tiles.tokens)

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
                for own_codes, own_scales, height, end in zip(codes, scales, self.heights, ends, strict=True):

                    @pl.when((row >= end - height) & (row < end))
                    def _(own_codes=own_codes, own_scales=own_scales, start=end - height):
                        rows = pl.ds(row - start, TILE)
                        plgpu.copy_gmem_to_smem(own_codes.at[rows, columns], codes_smem.at[slot], full.at[slot])
                        scale = own_scales.at[pl.ds(i * blocks, blocks), rows]
                        plgpu.copy_gmem_to_smem(scale, scales_smem.at[slot], full.at[slot])

                return done + 1

            def dense_step(i, counts):
                done, dense = counts
                first = (i - self.packed) * step
                slot = take(self.width + first, done)

                @pl.when(dense > 0)
                def _():
                    plgpu.barrier_wait(beside_free)

                for w in range(WARPGROUPS):  # as many copies as of a packed step
                    own = beside.at[pl.ds(row + w * ROWS, ROWS), pl.ds(first, step)]
                    plgpu.copy_gmem_to_smem(own, beside_smem.at[pl.ds(w * ROWS, ROWS)], full.at[slot])
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

    def compute(self, out, ring, beside_buffer, levels_smem, out_smem, a_smem, warpgroup):
        x_smem, codes_smem, scales_smem, full, free = ring
        beside_smem, beside_free = beside_buffer or (None, None)
        stages, own = np.int32(self.tiles.stages), pl.ds(warpgroup * ROWS, ROWS)

        def weights(done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(full.at[slot])
            codes, scales = codes_smem.at[slot, own], scales_smem.at[slot, :, own]
            if self.interpreted:
                return decoded(codes[...], scales[...])
            return decode(codes, scales, levels_smem, transforms=self.code_transforms, pitch=TILE)

        def multiply(acc, a, done):
            if self.interpreted and isinstance(a, jax.Array):
                a_smem[warpgroup] = a
                a = a_smem.at[warpgroup]
            plgpu.wgmma(acc, a, x_smem.at[lax.rem(done, stages)].T)

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

                def dense_step(_, done):
                    plgpu.barrier_wait(full.at[lax.rem(done, stages)])
                    multiply(acc, beside_smem.at[own], done)
                    release(done)
                    plgpu.barrier_arrive(beside_free)
                    return done + 1

                first = weights(done).astype(self.dtype), done
                a, last = lax.fori_loop(lo, middle - 1, packed_step, first)
                multiply(acc, a, last)
                release(last)
                end = last + 1
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
                place = part, pl.ds(token + i * self.piece, self.piece), pl.ds(row + warpgroup * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(target, out.at[place])
            return done

        self.for_items(one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _divide(number, by):
    return lax.div(number, np.int32(by)), lax.rem(number, np.int32(by))
