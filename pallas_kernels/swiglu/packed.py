"""The gated activation over gate and up side by side, as one matrix product makes them; without derivatives.

For backward passes written by hand. Rows may be made with room at their end for a matrix product's extra operands (see
low_rank), and the first columns of a row count where it is longer than needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.swiglu.op import _backward, _swiglu
from pallas_kernels.triton_call import triton_call, triton_obstacle

BLOCK, WARPS = 1024, 4


def swiglu_forward(
    gate_up: Float[Array, "T 2M"], *, room: int = 0, implementation: str | None = None
) -> Float[Array, "T M+room"]:
    """silu(gate) * up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _choose(implementation) == "xla":
        return jnp.pad(_swiglu(gate_up[:, :width], gate_up[:, width:]), ((0, 0), (0, room)))
    from pallas_kernels.swiglu.triton_kernels import forward_kernel

    return triton_call(
        forward_kernel,
        gate_up,
        out=jax.ShapeDtypeStruct((rows, width + room), gate_up.dtype),
        grid=(-(-width // BLOCK), rows),
        num_warps=WARPS,
        M=width,
        IN_STRIDE=2 * width,
        OUT_STRIDE=width + room,
        BLOCK=BLOCK,
    )


def swiglu_backward(
    gate_up: Float[Array, "T 2M"], g: Float[Array, "T G"], *, room: int = 0, implementation: str | None = None
) -> tuple[Float[Array, "T 2M+room"], Float[Array, "T M"]]:
    """(d_gate_up, y): the gradients for cotangents g, and the activation made again in the same pass."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _choose(implementation) == "xla":
        gate, up = gate_up[:, :width], gate_up[:, width:]
        gradients = jnp.concatenate(_backward((gate, up), g[:, :width]), axis=1)
        return jnp.pad(gradients, ((0, 0), (0, room))), _swiglu(gate, up)
    from pallas_kernels.swiglu.triton_kernels import backward_kernel

    out = (
        jax.ShapeDtypeStruct((rows, 2 * width + room), gate_up.dtype),
        jax.ShapeDtypeStruct((rows, width), gate_up.dtype),
    )
    return triton_call(
        backward_kernel,
        gate_up,
        g,
        out=out,
        grid=(-(-width // BLOCK), rows),
        num_warps=WARPS,
        M=width,
        IN_STRIDE=2 * width,
        G_STRIDE=g.shape[1],
        D_STRIDE=2 * width + room,
        BLOCK=BLOCK,
    )


def _choose(implementation: str | None) -> str:
    return choose_implementation("swiglu", implementation, {"triton": triton_obstacle(), "xla": None})
