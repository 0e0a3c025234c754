"""Arrays kept in 8 bits: blocks of 256 values, each with its largest magnitude and one byte a value.

A byte is an index into a *dynamic map*, 256 numbers in [-1, 1] (signed) or [0, 1] (unsigned) whose decades 1e-6 ... 1
hold 1, 2, 4, ... 64 numbers a sign (unsigned: twice as many): small values keep a relative precision that a linear
scale would lose, which is what the moments of Adam need. The maps are those of bitsandbytes.

    value = map[code] * absmax of its block,   code = index of the number nearest to value / absmax

In an unsigned array a value above zero never takes the code of zero, however near: it would be divided by.

A block is 256 consecutive values of the array in row-major order, the last one possibly shorter. The codes have the
array's own shape and so take its sharding. The scales are laid out along the array's axes wherever whole blocks fit:

    last axis a multiple of 256                        absmax [..., last / 256]
    256 = k * last, last axis but one a multiple of k  absmax [..., last but one / k]
    otherwise                                          absmax [ceil(size / 256)], over the flattened array
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.nf4.codebook import dynamic_map

BLOCK_SIZE = 256


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "absmax"), meta_fields=("signed",))
@dataclasses.dataclass(frozen=True)
class Blockwise8bit:
    """A quantised array. `codes.shape` is the array's shape, `absmax.shape` is `scale_shape(codes.shape)`."""

    codes: UInt8[Array, "..."]
    absmax: Float32[Array, "..."]
    signed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `absmax` for an array of this shape."""
    return _block_shape(shape)[:-1]


def quantize_blockwise(x: Float[Array, "..."], *, signed: bool) -> Blockwise8bit:
    """Nearest codes, a tie to the smaller number, as the module says. A block of zeros has scale 0 and is exact."""
    blocks = _to_blocks(x.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    normalised = blocks / jnp.where(absmax > 0, absmax, 1)[..., None]
    codes = _nearest(normalised, dynamic_map(signed=signed))
    if not signed:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), codes)
    return Blockwise8bit(_from_blocks(codes, x.shape), absmax, signed)


def zeros_blockwise(shape: tuple[int, ...], *, signed: bool) -> Blockwise8bit:
    """What an array of zeros becomes, without computing it: XLA would do so while it compiles, for seconds."""
    code = int(np.argmin(np.abs(dynamic_map(signed=signed))))
    return Blockwise8bit(jnp.full(shape, code, jnp.uint8), jnp.zeros(scale_shape(shape), jnp.float32), signed)


def dequantize_blockwise(q: Blockwise8bit) -> Float32[Array, "..."]:
    """map[code] * absmax."""
    values = _lookup(dynamic_map(signed=q.signed), _to_blocks(q.codes).astype(jnp.int32))
    return _from_blocks(values * q.absmax[..., None], q.shape)


def _block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The array seen as blocks, [..., 256]. Axes are split or the last two joined, so that sharding carries over."""
    rows, last = (1, 1, *shape)[-2:]
    if last and last % BLOCK_SIZE == 0:
        return (*shape[:-1], last // BLOCK_SIZE, BLOCK_SIZE)
    if last and rows and (rows * last) % BLOCK_SIZE == 0 and BLOCK_SIZE % last == 0:
        return (*shape[:-2], rows * last // BLOCK_SIZE, BLOCK_SIZE)
    return (math.ceil(math.prod(shape) / BLOCK_SIZE), BLOCK_SIZE)


def _to_blocks(x: jax.Array) -> jax.Array:
    shape = _block_shape(x.shape)
    missing = math.prod(shape) - x.size
    return (jnp.pad(x.reshape(-1), (0, missing)) if missing else x).reshape(shape)


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    return (blocks if blocks.size == size else blocks.reshape(-1)[:size]).reshape(shape)


def _nearest(x: jax.Array, numbers: np.ndarray) -> UInt8[Array, "..."]:
    """How many of the 255 midpoints lie below x: a binary search of 8 steps, fused into one elementwise loop."""
    midpoints = (numbers[:-1] + numbers[1:]) / np.float32(2)
    # the first step looks at one midpoint for all; as a lookup XLA would fold a constant of x's size, for seconds
    code = jnp.where(x > float(midpoints[127]), 128, 0)
    for step in (64, 32, 16, 8, 4, 2, 1):
        code += jnp.where(x > _lookup(midpoints, code + (step - 1)), step, 0)
    return code.astype(jnp.uint8)


def _lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
