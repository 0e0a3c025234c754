"""Packing whole blocks with a Triton kernel: one read of the values, one write of codes and scales.

A value's code is found in two steps instead of fifteen comparisons. Boundaries between codes are more than 1/16 apart, so
a cell of that width holds at most one: a table says how many boundaries lie in lower cells, and one comparison decides
on the cell's own. Both are exact, since the cell is a monotone function of the value, the same for values and boundaries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.nf4.codebook import BLOCK, nf4_boundaries
from pallas_kernels.triton_call import triton_call, triton_obstacle

CELLS = 64  # of which 33 are used: an index in this range needs no bounds check
WARPS, GROUPS = 4, 1


def pack_obstacle(w: jax.Array) -> str | None:
    """Why the kernel cannot pack w [..., out, in] here, or None."""
    if w.shape[-1] % BLOCK:
        return f"it takes widths that are a multiple of {BLOCK}, and {w.shape=}"
    return triton_obstacle()


@functools.cache
def cell_tables() -> tuple[np.ndarray, np.ndarray]:
    """float32 boundary of each cell, or inf; int32 number of boundaries in lower cells."""
    boundaries = nf4_boundaries()
    cells = (boundaries * np.float32(16) + np.float32(16)).astype(np.int32)
    assert len(set(cells)) == len(cells), "two boundaries in a cell"
    own = np.full(CELLS, np.inf, np.float32)
    own[cells] = boundaries
    return own, np.searchsorted(cells, np.arange(CELLS)).astype(np.int32)


def pack_blocks(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W [..., in] -> codes [..., in/2], uint32 bits of the scales [..., in/64]."""
    from pallas_kernels.nf4.triton_kernels import quantize_kernel

    blocks = w.size // BLOCK
    group = WARPS * 32 * (16 // w.dtype.itemsize) // (BLOCK // 2)  # blocks whose lower halves the threads load at once
    own, below = cell_tables()
    codes, scales = triton_call(
        quantize_kernel,
        w,
        jnp.asarray(own),
        jnp.asarray(below),
        out=[
            jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] // 2), jnp.uint8),
            jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] // BLOCK), jnp.float32),
        ],
        grid=(-(-blocks // (group * GROUPS)),),
        num_warps=WARPS,
        BLOCKS=blocks,
        GROUP=group,
        GROUPS=GROUPS,
    )
    return codes, lax.bitcast_convert_type(scales, jnp.uint32)
