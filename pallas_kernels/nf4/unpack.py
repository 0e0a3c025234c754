"""Unpacking with a Triton kernel: one launch a matrix, out of a stack and into its place, without a copy in between.

A matrix of a stack is named by an index in device memory, not cut out: cutting would copy it. Several matrices of one
width are unpacked one below the other into one array, each launch filling its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.nf4.array import NF4Array
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS, dynamic_map
from pallas_kernels.triton_call import triton_call, triton_obstacle
from pallas_kernels.tuning import choice


@dataclass(frozen=True)
class Tiles:
    """Blocks of 64 values that a program unpacks, and its warps."""

    blocks: int
    warps: int

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.blocks & (self.blocks - 1) or self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self}: blocks must be a power of two, and warps one too, at most 16.")


TILES = Tiles(blocks=128, warps=4)  # 4 KB of codes


def unpack_obstacle(q: NF4Array) -> str | None:
    """Why the kernel cannot unpack q here, or None."""
    if q.layout != "rows":
        return "it takes layout 'rows', whose width is a multiple of 64"
    return triton_obstacle()


def unpack(
    qs: Sequence[NF4Array], layers: Int[Array, "n"], dtype: Any, *, rows: int = 0, columns: int = 0
) -> Float[Array, "n out in"]:
    """Matrices layers[0], layers[1], ... of each stack [L, out_i, in], the stacks' rows one below the other.

    The result has as many more `rows` and `columns` than they fill, with nothing set there.
    """
    width, heights = qs[0].shape[-1], [q.shape[-2] for q in qs]
    shape = jax.ShapeDtypeStruct((layers.shape[0], sum(heights) + rows, width + columns), dtype)
    out, first = None, 0
    for q, height in zip(qs, heights, strict=True):
        out = _launch(q, layers, shape, out, first)
        first += height
    assert out is not None
    return out


def _launch(
    q: NF4Array, layers: jax.Array, shape: jax.ShapeDtypeStruct, previous: jax.Array | None, first_row: int
) -> jax.Array:
    from pallas_kernels.nf4.triton_kernels import dequantize_kernel

    height, width = q.shape[-2:]
    blocks = height * width // BLOCK
    levels, tiles = jnp.asarray(NF4_LEVELS), choice("dequantize_nf4", TILES)
    nested_map = dynamic_map() if q.nested_map is None else np.array(q.nested_map, np.float32)
    cell_rows, cell_columns = q.nested_cell or (1, 1)
    grid_rows, grid_columns = q.nested_scales.shape[-2:] if q.nested_scales is not None else (1, 1)
    return triton_call(
        dequantize_kernel,
        q.codes,
        q.scales,
        levels if q.nested_scales is None else q.nested_scales,
        levels if q.offset is None else q.offset,
        levels,
        jnp.asarray(nested_map),
        layers,
        levels if previous is None else previous,
        out=shape,
        grid=(-(-blocks // tiles.blocks), layers.shape[0]),
        num_warps=tiles.warps,
        aliases={} if previous is None else {7: 0},
        BLOCKS=blocks,
        DOUBLE=q.double_quant,
        SCALE_COLUMNS=width // BLOCK,
        CELL_ROWS=cell_rows,
        CELL_COLUMNS=cell_columns,
        NESTED_COLUMNS=grid_columns,
        NESTED_SIZE=grid_rows * grid_columns,
        FIRST_ROW=first_row,
        ROW_STRIDE=shape.shape[2],
        STRIDE=shape.shape[1] * shape.shape[2],
        FLUSH=jnp.dtype(shape.dtype) == jnp.bfloat16 and width % 16 == 0,
        GROUP=tiles.blocks,
        PTX=True,
    )
