"""The two gradients that read a large cotangent g: dz = s (g B^T), and dB = the diagonal blocks of z^T g; in one reading.

g [T, N+room] holds the cotangents of several linears side by side, of `widths` columns each, and linear i owns `ranks[i]`
of the columns of z. A program owns a strip of rows times a strip of one linear's columns. Going down its rows it adds up
dB's strip in registers, and each of its row tiles gives a part of dz, which the strips beside it complete:

    bytes = 2 T N of g + 4 T r (N / STRIP) of dz's parts + 4 r N (T / ROWS) of dB's parts

which is g and a few per cent. XLA adds the parts, in a fixed order: there are no atomics, and results repeat bit by bit.
The blocks off dB's diagonal are neither computed nor stored.

On an H200 at rank 16 a narrow strip of tall tiles is fastest: 256 x 64 values read g at 2.5 TB/s (16384 x 14336) and 1.0
TB/s (4096 x 4096), 512 x 32 at 1.4 and 0.2; wider ones are slower still. Few rows leave too few programs.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.triton_call import triton_call, triton_obstacle

LARGEST_RANK = 64  # of one linear: dB's strip stays in registers


def low_rank_gradients(
    z: Float[Array, "T R"],
    g: Float[Array, "T N+room"],
    b: Float[Array, "R N"],
    scales: Float[Array, "R"],
    ranks: Sequence[int],
    widths: Sequence[int],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N+room"], list[Float[Array, "r width"]]]:
    """(g with dz in its columns N .. N+R and zeros after, [dB_i in float32 of each linear whose rank is not 0]).

    b is block-diagonal: its blocks alone are read.
    """
    obstacle = triton_obstacle()
    if obstacle is None and max(ranks) > LARGEST_RANK:
        obstacle = f"{max(ranks)=} is more than {LARGEST_RANK}"
    chosen = choose_implementation("low_rank_gradients", implementation, {"triton": obstacle, "xla": None})
    one = _triton if chosen == "triton" else _xla
    dz, db = [], []
    starts = zip(_starts(ranks), _starts(widths), ranks, widths, strict=True)
    for row, column, rank, width in starts:
        if rank:
            block = b[row : row + rank, column : column + width]
            part, gradient = one(z[:, row : row + rank], g, block, column)
            dz.append(part)
            db.append(gradient)
    rows, outer = g.shape[0], sum(widths)
    whole = (jnp.concatenate(dz, axis=1) * scales[None]).astype(g.dtype)
    spare = jnp.zeros((rows, g.shape[1] - outer - whole.shape[1]), g.dtype)
    return jax.lax.dynamic_update_slice(g, jnp.concatenate([whole, spare], axis=1), (0, outer)), db


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def _xla(z: jax.Array, g: jax.Array, b: jax.Array, column: int) -> tuple[jax.Array, jax.Array]:
    g = g[:, column : column + b.shape[1]]

    def dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        precision, dimensions = exact_precision(x.dtype), (((axis,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    return dot(g, b, 1), dot(z, g, 0)


def _triton(z: jax.Array, g: jax.Array, b: jax.Array, column: int) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.low_rank.triton_kernels import gradients_kernel

    (rows, stride), (rank, width) = g.shape, b.shape
    padded = max(16, 1 << (rank - 1).bit_length())
    half = g.dtype.itemsize == 2
    strip = (256 if half else 128) * 16 // padded
    tile, down = (64, 512) if half else (32, 512)
    row_strips, column_strips = -(-rows // down), -(-width // strip)
    f32 = jnp.float32
    dz, db = triton_call(
        gradients_kernel,
        z,
        g,
        b,
        out=(
            jax.ShapeDtypeStruct((column_strips, rows, rank), f32),
            jax.ShapeDtypeStruct((row_strips, rank, width), f32),
        ),
        grid=(column_strips, row_strips),
        num_warps=4,
        num_stages=2,
        ROWS=rows,
        COLUMN=column,
        WIDTH=width,
        STRIDE=stride,
        RANK=rank,
        RANK_PADDED=padded,
        STRIP=strip,
        TILE=tile,
        DOWN=down,
        EXACT=not half,
    )
    return dz.sum(axis=0), db.sum(axis=0)
