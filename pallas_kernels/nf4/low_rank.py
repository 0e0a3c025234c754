"""The frozen linear with a low-rank one beside it, y = x W^T + s (x A) B: QLoRA's linear as one product each way.

With z = s x A [T, r] and cotangent g of y, nothing but x and z is needed again:

    y = [x z] [W B^T]^T        dz = s g B^T        dx = [g dz] [W; A^T]        dA = x^T dz        dB = z^T g

x and g come with room at the end of their rows, where z and dz are put in place (see low_rank); products.py multiplies
them. A and B are used in x's dtype; their gradients are float32 sums.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from pallas_kernels.low_rank import project_into
from pallas_kernels.nf4.array import NF4Slice
from pallas_kernels.nf4.products import input_gradient, product


def product_beside(
    x: Float[Array, "T in+room"],
    slices: Sequence[NF4Slice],
    a: Float[Array, "in R"],
    b: Float[Array, "R out"],
    scales: Float[Array, "R"],
    way: str | None = None,
) -> tuple[Float[Array, "T out"], Float[Array, "T in+room"]]:
    """(y, x with z in its room), for matrices one below the other."""
    x = project_into(x, a, scales)
    return product(x, slices, b.T, way=way), x


def input_gradient_beside(
    g: Float[Array, "T out+room"],
    slices: Sequence[NF4Slice],
    a: Float[Array, "in R"],
    b: Float[Array, "R out"],
    scales: Float[Array, "R"],
    way: str | None = None,
) -> tuple[Float[Array, "T in"], Float[Array, "T out+room"]]:
    """(dx, g with dz in its room)."""
    g = project_into(g, b.T, scales)
    return input_gradient(g, slices, a.T, way=way), g
