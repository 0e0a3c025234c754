"""A linear's input and LoRA's low-rank product of it, z = u A, made together for a few rows; without derivatives.

For decoding, where each launch counts: every output of a linear needs all of z, so z must be there before it, but nothing
keeps it from being made with the linear's input. A comes transposed, with its scale in it, and for all layers
(pallas_kernels.nf4.LowRank), of which `layer` is taken where it lies; without A, z is None.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.rms_norm import rms_norm_forward
from pallas_kernels.swiglu import swiglu_forward
from pallas_kernels.triton_call import triton_call, triton_obstacle

WARPS, BLOCK = 8, 4096
ROWS = 16  # with more, making the input anew for each number of z costs more than launches
PROGRAMS = 16  # that share a row out at least, where z has fewer numbers

Made = tuple[Float[Array, "m K"], Float[Array, "m Z"] | None]


def norm_and_project(
    x: Float[Array, "m K"],
    weight: Float[Array, "L K"],
    eps: float,
    a: Float[Array, "L Z K"] | None,
    layer: Int[Array, ""],
    *,
    implementation: str | None = None,
) -> Made:
    """(u, z): u = rms_norm(x)."""
    if _choose("norm_and_project", x, implementation) == "xla":
        return _with_z(rms_norm_forward(x, weight[layer], eps), a, layer)
    from pallas_kernels.low_rank.beside_kernels import norm_kernel

    width = x.shape[1]
    return _launch(norm_kernel, [x, weight], a, layer, x.shape, x.dtype, EPS=eps, BLOCK=1 << (width - 1).bit_length())


def swiglu_and_project(
    gate_up: Float[Array, "m 2K"],
    a: Float[Array, "L Z K"] | None,
    layer: Int[Array, ""],
    *,
    implementation: str | None = None,
) -> Made:
    """(h, z): h = silu(gate) up."""
    if _choose("swiglu_and_project", gate_up, implementation) == "xla":
        return _with_z(swiglu_forward(gate_up), a, layer)
    from pallas_kernels.low_rank.beside_kernels import swiglu_kernel

    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return _launch(swiglu_kernel, [gate_up], a, layer, (rows, width), gate_up.dtype, BLOCK=_block(width))


def project(
    x: Float[Array, "m K"], a: Float[Array, "L Z K"] | None, layer: Int[Array, ""], *, implementation: str | None = None
) -> Float[Array, "m Z"] | None:
    """z of an input that is there."""
    if a is None:
        return None
    if _choose("project", x, implementation) == "xla":
        return _with_z(x, a, layer)[1]
    from pallas_kernels.low_rank.beside_kernels import project_kernel

    (rows, width), count = x.shape, a.shape[1]
    return triton_call(
        project_kernel,
        x,
        a,
        layer[None],
        out=jax.ShapeDtypeStruct((rows, count), x.dtype),
        grid=(count, rows),
        num_warps=WARPS,
        K=width,
        Z=count,
        BLOCK=_block(width),
    )


def _launch(
    kernel: Any,
    inputs: list[jax.Array],
    a: jax.Array | None,
    layer: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    **constants: Any,
) -> Made:
    rows, width = shape
    count = 0 if a is None else a.shape[1]
    programs = max(count, PROGRAMS)
    y, z = triton_call(
        kernel,
        *inputs,
        inputs[0] if a is None else a,
        layer[None],
        out=(jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((rows, max(1, count)), dtype)),
        grid=(programs, rows),
        num_warps=WARPS,
        K=width,
        Z=count,
        SHARE=-(-width // programs),
        **constants,
    )
    return y, None if a is None else z


def _with_z(u: jax.Array, a: jax.Array | None, layer: jax.Array) -> Made:
    if a is None:
        return u, None
    factor = a[layer].astype(u.dtype)
    z = jnp.einsum("mk,zk->mz", u, factor, precision=exact_precision(u.dtype), preferred_element_type=jnp.float32)
    return u, z.astype(u.dtype)


def _block(width: int) -> int:
    return min(BLOCK, 1 << (width - 1).bit_length())


def _choose(op: str, x: jax.Array, implementation: str | None) -> str:
    obstacle = triton_obstacle()
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"it takes bfloat16 or float16, not {x.dtype}"
    elif x.shape[0] > ROWS:
        obstacle = f"it takes up to {ROWS} rows, and {x.shape=} has {x.shape[0]}"
    return choose_implementation(op, implementation, {"triton": obstacle, "xla": None})
