"""A low-rank product as more columns of a large one's operands: x W + z B = [x z] [W; B].

The sum is then made where the large product accumulates, in float32, at the cost of a few more columns to contract, and
the result is written once. Whatever kernel makes x leaves room for z at the end of its rows (`room` columns, a multiple
of 64, so that rows stay aligned); z goes there in place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.triton_call import triton_call, triton_obstacle

ALIGNMENT = 64
PROGRAMS = 512  # of contract_rows: several for each of a large GPU's multiprocessors
FEW = 128  # rows that project_into takes one by one: as tiles they would be too few to fill a GPU


def room_for(rank: int) -> int:
    """Columns to leave for a low-rank operand of so many."""
    return -(-rank // ALIGNMENT) * ALIGNMENT


def project_into(
    x: Float[Array, "T K+room"], a: Float[Array, "K R"], scales: Float[Array, "R"], *, implementation: str | None = None
) -> Float[Array, "T K+room"]:
    """x with z = scales * (x[:, :K] a) in its columns K .. K+R, and zeros in those after."""
    (rows, width), (inner, rank) = x.shape, a.shape
    room = width - inner
    if choose_implementation("project_into", implementation, {"triton": triton_obstacle(), "xla": None}) == "xla":
        dimensions = (((1,), (0,)), ((), ()))
        z = jax.lax.dot_general(
            x[:, :inner], a, dimensions, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32
        )
        z = jnp.pad((z * scales[None]).astype(x.dtype), ((0, 0), (0, room - rank)))
        return jax.lax.dynamic_update_slice(x, z, (0, inner))
    from pallas_kernels.low_rank.triton_kernels import project_kernel, project_row_kernel

    if rows <= FEW:
        each = 8
        return triton_call(
            project_row_kernel,
            x,
            a.T,
            scales,
            out=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(-(-room // each), rows),
            num_warps=8,
            num_stages=2,
            aliases={0: 0},
            K=inner,
            R=rank,
            STRIDE=width,
            EACH=each,
            BLOCK=min(2048, 1 << (inner - 1).bit_length()),
        )
    block_rows, block_columns = 64 if rows >= 8192 else 32, min(64, room)
    return triton_call(
        project_kernel,
        x,
        a,
        scales,
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(-(-rows // block_rows), -(-room // block_columns)),
        num_warps=4,
        num_stages=4,
        aliases={0: 0},
        ROWS=rows,
        K=inner,
        R=rank,
        STRIDE=width,
        BLOCK_ROWS=block_rows,
        BLOCK_K=128 if x.dtype.itemsize == 2 else 32,
        BLOCK_COLUMNS=block_columns,
        EXACT=x.dtype == jnp.float32,
    )


def contract_rows(
    thin: Float[Array, "T any"],
    wide: Float[Array, "T N+any"],
    *,
    rank: int,
    start: int = 0,
    columns: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """thin^T wide in float32, of `rank` columns of thin from `start` on and the first `columns` of wide.

    Rows are summed in parts, and those parts in order: the same bits every time.
    """
    rows, columns = wide.shape[0], wide.shape[1] if columns is None else columns
    obstacle = triton_obstacle() or (f"it takes up to 256 columns, not {rank}" if rank > 256 else None)
    if choose_implementation("contract_rows", implementation, {"triton": obstacle, "xla": None}) == "xla":
        dimensions = (((0,), (0,)), ((), ()))
        left, right = thin[:, start : start + rank], wide[:, :columns]
        precision = exact_precision(wide.dtype)
        return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
    from pallas_kernels.low_rank.triton_kernels import contract_kernel

    block_rows, block_columns = (64, 128) if rank <= 64 else (32, 64)
    strips = -(-columns // block_columns)
    parts = max(1, min(PROGRAMS // strips, -(-rows // block_rows)))
    part = -(-rows // parts // block_rows) * block_rows
    parts = -(-rows // part)
    sums = triton_call(
        contract_kernel,
        thin,
        wide,
        out=jax.ShapeDtypeStruct((parts, rank, columns), jnp.float32),
        grid=(strips, parts),
        num_warps=4,
        num_stages=4 if wide.dtype.itemsize == 2 else 2,
        ROWS=rows,
        R=rank,
        N=columns,
        THIN_START=start,
        THIN_STRIDE=thin.shape[1],
        WIDE_STRIDE=wide.shape[1],
        PART=part,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        R_PADDED=max(16, 1 << (rank - 1).bit_length()),
        EXACT=wide.dtype == jnp.float32,
    )
    return jnp.sum(sums, axis=0)
