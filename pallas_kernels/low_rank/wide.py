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
    from pallas_kernels.low_rank.triton_kernels import project_kernel

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
