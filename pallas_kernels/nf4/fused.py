"""Products with a packed matrix by Triton kernels that decode it in registers (matmul_kernels.py): both passes.

They read the packed bytes once for every so many tokens (`Tiles.tokens`), and nothing is written but the result, where
unpacking first writes and reads two bytes a weight. That pays while tokens are few; with many, decoding again for each
tile of tokens costs more than it saves. Which it is, the tile table says (see tuning).

Levels are rounded to x's dtype, then scaled and rounded again; in bfloat16 the scale is rounded too, since decoding is what
such a kernel waits for. Of normal weights that is 0.26 % of their norm where unpacking to bfloat16 rounds away 0.17 %, beside
the 9 % that four bits cost. So results agree with those of unpacking to the rounding of a weight, not bit for bit. Parts of
a long sum (`Tiles.splits`) are added up in a fixed order: the same bits every time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.nf4.array import NF4Array, NF4Slice
from pallas_kernels.nf4.codebook import BLOCK, NF4_LEVELS
from pallas_kernels.nf4.dequantize import block_scales
from pallas_kernels.triton_call import triton_call, triton_obstacle
from pallas_kernels.tuning import bucket, choice

LARGEST = 1 << 31  # bytes of codes that a kernel counts in int32
PROGRAMS = 264  # two for each of a large GPU's multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a program; rows of the weight and blocks of 64 columns, owned or a step; warps, stages, parts of a sum."""

    tokens: int
    rows: int
    blocks: int
    warps: int
    stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "blocks", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{self}: {name} must be a power of two.")
        if not 16 <= self.tokens <= 256 or not 16 <= self.rows <= 256 or self.blocks > 8:
            raise ValueError(f"{self}: tokens and rows must be 16 to 256, blocks at most 8.")
        if self.warps not in (2, 4, 8) or not 1 <= self.stages <= 8 or not 1 <= self.splits <= 64:
            raise ValueError(f"{self}: warps must be 2, 4 or 8, stages 1 to 8 and splits 1 to 64.")


def default_tiles(which: str, tokens: int, out: int, width: int) -> Tiles:
    """Of the "forward" pass or the "input_gradient", in the 99 KB of shared memory that consumer cards have."""
    wide = min(128, bucket(tokens))
    warps = 8 if wide == 128 else 4
    if which == "forward":
        tiles = Tiles(wide, rows=128 if warps == 8 else 64, blocks=1, warps=warps)
        programs, steps = -(-out // tiles.rows), width // BLOCK
    else:
        tiles = Tiles(wide, rows=64, blocks=4 if warps == 8 else 2, warps=warps)
        programs, steps = -(-width // BLOCK // tiles.blocks), -(-out // tiles.rows)
    programs *= -(-tokens // tiles.tokens)
    return dataclasses.replace(tiles, splits=max(1, min(8, PROGRAMS // programs, steps // 8)))


def fused_obstacle(x: jax.Array, q: NF4Array) -> str | None:
    """Why the kernels cannot multiply these here, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {x.dtype}"
    if q.layout != "rows":
        return f"it takes layout 'rows', whose width is a multiple of {BLOCK}"
    if x.size == 0 or q.codes.size >= LARGEST:
        return f"it takes at least one row, and a weight of less than {2 * LARGEST} values"
    return triton_obstacle()


def product(
    x: Float[Array, "T in+room"],
    q: NF4Array | NF4Slice,
    beside: Float[Array, "out room"] | None = None,
    *,
    tiles: Tiles | None = None,
) -> Float[Array, "T out"]:
    """x [W beside]^T in x's dtype; room is a multiple of 64 (see low_rank). One of a stack is not cut out of it."""
    from pallas_kernels.nf4.matmul_kernels import product_kernel

    (tokens, _), (out, width) = x.shape, q.shape
    tiles = tiles or tuned("forward", tokens, out, width)
    programs = -(-out // tiles.rows)
    return _launch(product_kernel, x, q, beside, out, x.shape[1] - width, programs, tiles)


def input_gradient(
    g: Float[Array, "T out+room"],
    q: NF4Array | NF4Slice,
    beside: Float[Array, "room in"] | None = None,
    *,
    tiles: Tiles | None = None,
) -> Float[Array, "T in"]:
    """g [W; beside] in g's dtype."""
    from pallas_kernels.nf4.matmul_kernels import input_gradient_kernel

    (tokens, _), (out, width) = g.shape, q.shape
    tiles = tiles or tuned("input_gradient", tokens, out, width)
    programs = -(-width // (BLOCK * tiles.blocks))
    return _launch(input_gradient_kernel, g, q, beside, width, g.shape[1] - out, programs, tiles)


def tuned(which: str, tokens: int, out: int, width: int) -> Tiles:
    default = default_tiles(which, tokens, out, width)
    return choice(f"nf4_matmul.{which}.tiles", default, tokens=bucket(tokens), out=out, width=width)


def _launch(
    kernel: Any,
    x: jax.Array,
    q: NF4Array | NF4Slice,
    beside: jax.Array | None,
    columns: int,
    room: int,
    programs: int,
    tiles: Tiles,
) -> jax.Array:
    if room % BLOCK or (beside is None) != (room == 0):
        raise ValueError(f"{x.shape=} leaves room for {room} columns beside the weight's, of which {beside=} is made.")
    (height, width), tokens, splits = q.shape, x.shape[0], tiles.splits
    dtype = jnp.float32 if splits > 1 else x.dtype
    levels = jnp.asarray(NF4_LEVELS)
    codes, scales, index = _parts(q)
    parts = triton_call(
        kernel,
        x,
        codes,
        scales,
        levels,
        index,
        levels if beside is None else beside,
        out=jax.ShapeDtypeStruct((splits, tokens, columns), dtype),
        grid=(-(-tokens // tiles.tokens) * programs, splits),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        M=tokens,
        N=height,
        BLOCKS=width // BLOCK,
        ROOM=room,
        BM=tiles.tokens,
        BN=tiles.rows,
        S=tiles.blocks,
        SPLITS=splits,
        STAGES=tiles.stages,
        PTX=True,
    )
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0).astype(x.dtype)


def _parts(q: NF4Array | NF4Slice) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A stack's codes, one matrix's block scales, and the matrix's index [1]."""
    if isinstance(q, NF4Array):
        return jnp.asarray(q.codes), block_scales(q), jnp.zeros(1, jnp.int32)
    names = [name for name in ("scales", "nested_scales", "offset") if getattr(q.stack, name) is not None]
    own = {name: getattr(q.stack, name)[q.index] for name in names}
    return q.stack.codes, block_scales(dataclasses.replace(q.stack, **own)), q.index[None]
