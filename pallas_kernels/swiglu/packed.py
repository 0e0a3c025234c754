"""The gated activation over gate and up side by side, as one matrix product makes them; without derivatives.

For backward passes written by hand. Rows may be made with room at their end for a matrix product's extra operands (see
low_rank), and the first columns of a row count where it is longer than needed.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.swiglu.op import _backward, _swiglu
from pallas_kernels.triton_call import triton_call, triton_obstacle
from pallas_kernels.tuning import choice


@dataclass(frozen=True)
class Tiles:
    """Values of a row that a program takes, and its warps."""

    block: int
    warps: int

    def __post_init__(self) -> None:
        if self.block < 32 or self.block & (self.block - 1) or self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self}: block must be a power of two, 32 at least, and warps one too, at most 16.")


TILES = Tiles(block=1024, warps=4)


def swiglu_forward(
    gate_up: Float[Array, "T 2M"], *, room: int = 0, implementation: str | None = None
) -> Float[Array, "T M+room"]:
    """silu(gate) * up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _choose(implementation) == "xla":
        return jnp.pad(_swiglu(gate_up[:, :width], gate_up[:, width:]), ((0, 0), (0, room)))
    from pallas_kernels.swiglu.triton_kernels import forward_kernel

    tiles = choice("swiglu.forward", TILES)
    return triton_call(
        forward_kernel,
        gate_up,
        out=jax.ShapeDtypeStruct((rows, width + room), gate_up.dtype),
        grid=(-(-width // tiles.block), rows),
        num_warps=tiles.warps,
        M=width,
        IN_STRIDE=2 * width,
        OUT_STRIDE=width + room,
        BLOCK=tiles.block,
    )


def swiglu_backward(
    gate_up: Float[Array, "T 2M"], g: Float[Array, "T G"], *, room: int = 0, implementation: str | None = None
) -> tuple[Float[Array, "T 2M+room"], Float[Array, "T M"]]:
    """(d_gate_up, y): the gradients for cotangents g, and the activation made again in the same pass, in g's place if it fits."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _choose(implementation) == "xla":
        gate, up = gate_up[:, :width], gate_up[:, width:]
        gradients = jnp.concatenate(_backward((gate, up), g[:, :width]), axis=1)
        return jnp.pad(gradients, ((0, 0), (0, room))), _swiglu(gate, up)
    from pallas_kernels.swiglu.triton_kernels import backward_kernel

    tiles = choice("swiglu.backward", TILES)
    out = (
        jax.ShapeDtypeStruct((rows, 2 * width + room), gate_up.dtype),
        jax.ShapeDtypeStruct((rows, width), gate_up.dtype),
    )
    return triton_call(
        backward_kernel,
        gate_up,
        g,
        out=out,
        grid=(-(-width // tiles.block), rows),
        num_warps=tiles.warps,
        aliases={1: 1} if (g.shape, g.dtype) == (out[1].shape, out[1].dtype) else {},
        M=width,
        IN_STRIDE=2 * width,
        G_STRIDE=g.shape[1],
        D_STRIDE=2 * width + room,
        BLOCK=tiles.block,
    )


def _choose(implementation: str | None) -> str:
    return choose_implementation("swiglu", implementation, {"triton": triton_obstacle(), "xla": None})
