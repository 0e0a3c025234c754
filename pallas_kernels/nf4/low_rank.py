"""The frozen linear with a low-rank one beside it, y = x W^T + s (x A) B: QLoRA's linear as one product each way.

With z = s x A [T, r] and cotangent g of y, nothing but x and z is needed again:

    y = [x z] [W B^T]^T        dz = s g B^T        dx = [g dz] [W; A^T]        dA = x^T dz        dB = z^T g

x and g come with room at the end of their rows, where z and dz are put in place (see low_rank); the weight is unpacked
into room for the other factor, or that goes into the kernel that decodes it in registers, as one more step of its sum.
A and B are used in x's dtype; their gradients are float32 sums.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import exact_precision
from pallas_kernels.low_rank import project_into
from pallas_kernels.nf4 import fused
from pallas_kernels.nf4.array import NF4Slice
from pallas_kernels.nf4.slices import unpack_slices


def product_beside(
    x: Float[Array, "T in+room"],
    slices: Sequence[NF4Slice],
    a: Float[Array, "in R"],
    b: Float[Array, "R out"],
    scales: Float[Array, "R"],
    way: str,
) -> tuple[Float[Array, "T out"], Float[Array, "T in+room"]]:
    """(y, x with z in its room), for matrices one below the other; by way of "xla", or of "triton" for one of them."""
    (inner, rank), room = a.shape, x.shape[1] - a.shape[0]
    x = project_into(x, a, scales)
    beside = jnp.pad(b.T, ((0, 0), (0, room - rank)))
    if way == "triton":
        (one,) = slices
        return fused.product(x, one, beside), x
    weight = unpack_slices(slices, x.dtype, after=x, columns=room)
    return _contract(x, jax.lax.dynamic_update_slice(weight, beside, (0, inner)), 1), x


def input_gradient_beside(
    g: Float[Array, "T out+room"],
    slices: Sequence[NF4Slice],
    a: Float[Array, "in R"],
    b: Float[Array, "R out"],
    scales: Float[Array, "R"],
    way: str,
) -> tuple[Float[Array, "T in"], Float[Array, "T out+room"]]:
    """(dx, g with dz in its room)."""
    (rank, outer), room = b.shape, g.shape[1] - b.shape[1]
    g = project_into(g, b.T, scales)
    below = jnp.pad(a.T, ((0, room - rank), (0, 0)))
    if way == "triton":
        (one,) = slices
        return fused.input_gradient(g, one, below), g
    weight = unpack_slices(slices, g.dtype, after=g, rows=room)
    return _contract(g, jax.lax.dynamic_update_slice(weight, below, (outer, 0)), 0), g


def _contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x, weight, (((1,), (axis,)), ((), ())), precision=exact_precision(x.dtype), preferred_element_type=x.dtype
    )
