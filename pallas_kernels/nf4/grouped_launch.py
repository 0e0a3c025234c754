"""How the kernel of grouped_kernels.py is launched: for `linears`, and for `nf4_matvec` with one weight.

How a program's work is cut is chosen here, from the shapes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.nf4.array import NF4Array
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS, dynamic_map
from pallas_kernels.nf4.grouped_work import TILE, Work
from pallas_kernels.triton_call import has_room, triton_call

ROWS = 16  # of x, at most
RANKS = 16  # that a product of tensor cores takes
WARPS = 16
PROGRAMS = 132  # one for each of an H200's multiprocessors
MOST = 3  # weights that the kernel takes
IN_RING, SLOTS = 4, 4  # blocks of a warp in a stage of the ring, and stages


def launch(
    x: Float[Array, "m in"],
    stacks: Sequence[NF4Array],
    layer: jax.Array,
    z: Float[Array, "m n*R"] | None,
    b: Float[Array, "L out R"] | None,
    residual: Float[Array, "m out"] | None,
    programs: int = PROGRAMS,
) -> Float[Array, "m out"]:
    from pallas_kernels.nf4.grouped_kernels import linears_kernel

    first, rows = stacks[0], x.shape[0]
    levels = jnp.asarray(NF4_LEVELS)
    nested_map = dynamic_map() if first.nested_map is None else np.array(first.nested_map, np.float32)
    pointers = []
    for i in range(MOST):
        stack = stacks[min(i, len(stacks) - 1)]  # one that is not there has no tiles
        nested = levels if stack.nested_scales is None else stack.nested_scales
        pointers += [stack.codes, stack.scales, nested, levels if stack.offset is None else stack.offset]
    work = work_of(stacks, rows, programs, 0 if b is None else b.shape[-1], residual is not None)
    return triton_call(
        linears_kernel,
        x,
        *pointers,
        levels,
        jnp.asarray(nested_map),
        jnp.asarray(layer, jnp.int32)[None],
        x if z is None else z,
        x if b is None else b,
        x if residual is None else residual,
        out=jax.ShapeDtypeStruct((rows, work.outputs), x.dtype),
        grid=(work.programs,),
        num_warps=WARPS,
        num_stages=1,
        W=work,
    )


def work_of(stacks: Sequence[NF4Array], rows: int, programs: int, rank: int, residual: bool) -> Work:
    first, heights = stacks[0], [stack.shape[-2] for stack in stacks]
    nested = [0 if stack.nested_scales is None else stack.nested_scales.shape[-2] for stack in stacks]
    columns = 1 if first.nested_scales is None else first.nested_scales.shape[-1]
    cell_rows, cell_columns = first.nested_cell or (1, 1)
    blocks, cell = first.shape[-1] // BLOCK, cell_columns if columns > 1 else None
    whole = all(height % TILE == 0 for height in heights)
    slots = SLOTS if first.double_quant and whole and _in_bulk() and fits_a_ring(blocks, rows, cell) else 0
    per, programs = turns_of(heights, rows, programs, adding=0.3 if slots else 1)
    return Work(
        rows=rows,
        heights=_padded(heights),
        blocks=blocks,
        double_quant=first.double_quant,
        nested_heights=_padded(nested),
        nested_columns=columns,
        cell=(cell_rows, cell_columns),
        rank=rank,
        lora_weights=len(stacks),
        residual=residual,
        run=IN_RING if slots else blocks_at_once(blocks, rows, per, cell),
        per=per,
        warps=WARPS,
        programs=programs,
        slots=slots,
    )


def _padded(sizes: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = [*sizes, *[0] * (MOST - len(sizes))]
    return first, second, third


def turns_of(heights: Sequence[int], rows: int, programs: int, adding: float = 1) -> tuple[int, int]:
    """(tiles of a turn, programs): a turn's tiles are of one weight, and as many as registers allow and leave no program idle.
    Adding up at a turn's end takes `adding` times as long as a tile; more where codes are not on their way meanwhile."""
    counts = [-(-height // TILE) for height in heights]
    common = math.gcd(*counts) if all(height % TILE == 0 for height in heights) else 1

    def cost(per: int) -> float:
        return -(-sum(counts) // (per * programs)) * (per + adding)

    per = min((per for per in range(1, 8 if rows <= 8 else 3) if common % per == 0), key=cost)
    turns = sum(counts) // per
    return per, -(-turns // -(-turns // programs))


def _in_bulk() -> bool:
    return (cuda_capability() or (0, 0)) >= (9, 0) and has_room()


def fits_a_ring(blocks: int, rows: int, cell: int | None) -> bool:
    """Whether codes come in bulk: in stages of 32 KB, that warps share out evenly. Smaller stages, as the MLP's width would
    have, and x of more than 8 rows, of whose parts registers hold fewer, took longer than loads (bench/results/h200/trials.json).
    """
    return rows <= 8 and blocks % (IN_RING * WARPS) == 0 and (cell or IN_RING) % IN_RING == 0


def blocks_at_once(blocks: int, rows: int, per: int, cell: int | None) -> int:
    """How many neighbouring blocks a warp takes at a time: their scales are one load and of one cell; so many that warps are idle
    least. Over 8 rows take twice the registers, and so do many tiles."""
    sizes = (1,) if rows > 8 else (2, 1) if per > 4 else (4, 2, 1)
    possible = [run for run in sizes if blocks % run == 0 and (cell or run) % run == 0]
    return min(possible, key=lambda run: -(-blocks // (run * WARPS)) * run)  # the first of equals
