"""y = x W^T for a few rows of x and a packed W: decoding, where the packed bytes are all that is worth reading.

Levels are rounded to x's dtype and multiplied by x; the sum over a block, in float32, is multiplied by the block's float32
scale. So each product is rounded once, as it is when W is unpacked to x's dtype first, but not in the same place: results
agree to the rounding of a weight, not bit for bit.

bfloat16 and float16 take the kernel of `linears` with this one weight; float32 is summed in plain multiply-adds.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.nf4 import grouped_launch
from pallas_kernels.nf4.array import NF4Array, NF4Slice, check_packed
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS, dynamic_map
from pallas_kernels.nf4.dequantize import dequantize_nf4
from pallas_kernels.nf4.grouped_launch import ROWS
from pallas_kernels.triton_call import triton_call, triton_obstacle

FLOATS = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Outputs a program makes, blocks of 64 of each that it takes a step, and warps, in float32."""

    outputs: int
    blocks: int
    warps: int = 4

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tiles.{name} is {value}; it must be a power of two.")


TILES = Tiles(outputs=8, blocks=16)


def nf4_matvec(
    x: Float[Array, "... in"], q: NF4Array | NF4Slice, *, implementation: str | None = None
) -> Float[Array, "... out"]:
    """x @ W^T in x's dtype, accumulated in float32, for up to 16 rows of x; differentiable in x only.

    Args:
        x: bfloat16, float16 or float32 [..., in].
        q: one packed matrix [out, in], or one of a stack by its index, which is then not cut out.
        implementation: "triton" (up to 16 rows, `in` a multiple of 64) or "xla" (unpack, then a dense product).
    """
    check_packed("nf4_matvec", q, NF4Array | NF4Slice)
    obstacle = matvec_obstacle(x, q)
    chosen = choose_implementation("nf4_matvec", implementation, {"triton": obstacle, "xla": None})
    if len(q.shape) != 2:
        raise ValueError(f"nf4_matvec takes one matrix [out, in], but {q.shape=} is a stack; give an NF4Slice of it.")
    if x.ndim == 0 or x.shape[-1] != q.shape[-1]:
        raise ValueError(f"nf4_matvec needs x [..., in] for a weight [out, in], but {x.shape=} and {q.shape=}.")
    if x.dtype not in FLOATS:
        raise TypeError(f"nf4_matvec takes float32, bfloat16 or float16, not {x.dtype=}.")
    return _matvec(chosen, x, q)


def matvec_obstacle(x: jax.Array, q: NF4Array | NF4Slice) -> str | None:
    """Why the kernels cannot multiply these here, or None."""
    rows = math.prod(x.shape[:-1])
    if not 1 <= rows <= ROWS:
        return f"it takes 1 to {ROWS} rows, and {x.shape=} has {rows}"
    if (q.stack if isinstance(q, NF4Slice) else q).layout != "rows":
        return f"it takes layout 'rows', whose width is a multiple of {BLOCK}"
    return triton_obstacle()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matvec(implementation: str, x: jax.Array, q: NF4Array | NF4Slice) -> jax.Array:
    if implementation == "xla":
        return _contract(x, _unpacked(q, x.dtype), 1)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(q, NF4Slice):
        y = launch(rows, q.stack, q.index)
    else:
        y = launch(rows, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], q), jnp.int32(0))
    return y.reshape(*x.shape[:-1], -1)


def _forward(implementation: str, x: jax.Array, q: NF4Array | NF4Slice) -> tuple[jax.Array, NF4Array | NF4Slice]:
    return _matvec(implementation, x, q), q


def _backward(implementation: str, q: NF4Array | NF4Slice, g: jax.Array) -> tuple[jax.Array, None]:
    return _contract(g, _unpacked(q, g.dtype), 0), None  # dx = g W


_matvec.defvjp(_forward, _backward)


def _unpacked(q: NF4Array | NF4Slice, dtype: jnp.dtype) -> jax.Array:
    return dequantize_nf4(q.cut() if isinstance(q, NF4Slice) else q, dtype)


def _contract(x: jax.Array, weight: jax.Array, weight_axis: int) -> jax.Array:
    dimensions = (((x.ndim - 1,), (weight_axis,)), ((), ()))
    precision = exact_precision(x.dtype)
    product = lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)


def launch(x: jax.Array, stack: NF4Array, index: jax.Array) -> jax.Array:
    """x [m, in] times the transpose of one matrix of a stack [L, out, in]: [m, out]."""
    if x.dtype != jnp.float32:
        return grouped_launch.launch(x, [stack], index, None, None, None)
    from pallas_kernels.nf4.matvec_kernels import matvec_kernel

    rows, width = x.shape
    height = stack.shape[-2]
    levels = jnp.asarray(NF4_LEVELS)
    nested_map = dynamic_map() if stack.nested_map is None else np.array(stack.nested_map, np.float32)
    cell_rows, cell_columns = stack.nested_cell or (1, 1)
    grid_rows, grid_columns = stack.nested_scales.shape[-2:] if stack.nested_scales is not None else (1, 1)
    return triton_call(
        matvec_kernel,
        x,
        stack.codes,
        stack.scales,
        levels if stack.nested_scales is None else stack.nested_scales,
        levels if stack.offset is None else stack.offset,
        levels,
        jnp.asarray(nested_map),
        index[None],
        out=jax.ShapeDtypeStruct((rows, height), x.dtype),
        grid=(-(-height // TILES.outputs), rows),
        num_warps=TILES.warps,
        N=height,
        SCALE_COLUMNS=width // BLOCK,
        DOUBLE=stack.double_quant,
        CELL_ROWS=cell_rows,
        CELL_COLUMNS=cell_columns,
        NESTED_COLUMNS=grid_columns,
        NESTED_SIZE=grid_rows * grid_columns,
        S=TILES.blocks,
        BN=TILES.outputs,
    )
