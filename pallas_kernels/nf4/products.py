"""[x z] [W beside]^T and [g dz] [W; beside], with packed W, each by the way that was measured to be fastest.

W may be several matrices one below the other, of one width and one index in their stacks. `beside` is LoRA's other
factor, which meets what x and g have in the room at the end of their rows (see low_rank): one product makes both sums.

- `mosaic` decodes W in registers on Hopper, forward only (mosaic.py); by default for up to 1024 tokens, with which
  it takes less time than unpacking and a dense product.
- `triton` decodes in registers on any GPU, one matrix (fused.py); only where a device's table says that it is faster.
- `xla` unpacks W into room for `beside`, then lets cuBLAS multiply.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.nf4 import fused, mosaic
from pallas_kernels.nf4.array import NF4Slice
from pallas_kernels.nf4.slices import unpack_slices
from pallas_kernels.tuning import bucket, choice

PASSES = ("forward", "input_gradient")
# between 256 tokens, where `mosaic` takes less time than unpacking, and 4096, where it takes more (trials.json)
MOSAIC_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Way:
    """By which implementation a pass goes."""

    implementation: str

    def __post_init__(self) -> None:
        if self.implementation not in ("mosaic", "triton", "xla"):
            raise ValueError(f"{self.implementation=} must be mosaic, triton or xla.")


def way_of(which: str, x: jax.Array, slices: Sequence[NF4Slice], implementation: str | None = None) -> str:
    """The implementation of the "forward" pass or the "input_gradient", for an operand [T, ..]."""
    obstacles = _obstacles(which, x, slices)
    if implementation == "mosaic" and which == "input_gradient":
        return "xla"
    if implementation is not None:
        return choose_implementation("nf4_matmul", implementation, obstacles)
    out, width = sum(one.shape[0] for one in slices), slices[0].shape[1]
    default = default_way(which, x, slices)
    chosen = choice(f"nf4_matmul.{which}", default, tokens=bucket(x.shape[0]), out=out, width=width).implementation
    return chosen if obstacles[chosen] is None else "xla"


def default_way(which: str, x: jax.Array, slices: Sequence[NF4Slice]) -> Way:
    """Where nothing was measured."""
    able = _obstacles(which, x, slices)["mosaic"] is None
    return Way("mosaic" if able and x.shape[0] <= MOSAIC_TOKENS else "xla")


def _obstacles(which: str, x: jax.Array, slices: Sequence[NF4Slice]) -> dict[str, str | None]:
    return {
        "mosaic": mosaic.obstacle(x, slices) if which == "forward" else "it has no input gradient",
        "triton": fused.fused_obstacle(x, slices[0].stack) if len(slices) == 1 else "it takes one matrix",
        "xla": None,
    }


def product(
    x: Float[Array, "T in+room"],
    slices: Sequence[NF4Slice],
    beside: Float[Array, "out R"] | None = None,
    *,
    way: str | None = None,
) -> Float[Array, "T out"]:
    """x [W beside]^T in x's dtype, accumulated in float32; x's columns past R are zeros."""
    width = slices[0].shape[1]
    room = x.shape[1] - width
    if beside is not None:
        beside = jnp.pad(beside, ((0, 0), (0, room - beside.shape[1])))
    way = way or way_of("forward", x, slices)
    if way == "mosaic":
        return mosaic.product(x, slices, beside)
    if way == "triton":
        return fused.product(x, slices[0], beside)
    weight = unpack_slices(slices, x.dtype, after=x, columns=room)
    return _contract(x, weight if beside is None else jax.lax.dynamic_update_slice(weight, beside, (0, width)), 1)


def input_gradient(
    g: Float[Array, "T out+room"],
    slices: Sequence[NF4Slice],
    below: Float[Array, "R in"] | None = None,
    *,
    way: str | None = None,
) -> Float[Array, "T in"]:
    """g [W; below] in g's dtype, accumulated in float32; g's columns past R are zeros."""
    height = sum(one.shape[0] for one in slices)
    room = g.shape[1] - height
    if below is not None:
        below = jnp.pad(below, ((0, room - below.shape[0]), (0, 0)))
    way = way or way_of("input_gradient", g, slices)
    if way == "triton":
        return fused.input_gradient(g, slices[0], below)
    weight = unpack_slices(slices, g.dtype, after=g, rows=room)
    return _contract(g, weight if below is None else jax.lax.dynamic_update_slice(weight, below, (height, 0)), 0)


def _contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x, weight, (((1,), (axis,)), ((), ())), precision=exact_precision(x.dtype), preferred_element_type=x.dtype
    )
