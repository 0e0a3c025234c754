"""Several linears of one input for a few rows: decoding, where a launch costs as much as a small weight.

With weights W_i [out_i, in] one below the other, LoRA factors A_i [in, r_i] and B_i [r_i, out_i] and a residual:

    y = x [W_1; W_2; ..]^T + [z_1 B_1, z_2 B_2, ..] + residual        z_i = s_i x A_i

Up to 16 rows are one launch. More are one of mosaic.py's on Hopper, with z beside x; elsewhere they are several, as x stays
in a multiprocessor's cache then while the codes pass; the bytes that this moves for 64 rows are still fewer than unpacking
would, which writes all weights and reads them again.

What the latter would make anew for each product, block scales in float32 and LoRA's factor as a matrix beside the weights,
a loop over tokens makes once (`ready`), at 4 bytes for 64 weights and 2 room for each of their rows.

z is the caller's, who makes it together with x (see low_rank.beside): each output needs all of it. The kernel
(grouped_launch.py) makes y in one launch; as in nf4_matvec, levels are rounded to x's dtype and a block's sum is multiplied
by its scale in float32. What it cannot take runs as nf4_matvec, weight by weight, and sums after it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.low_rank import room_for, summands
from pallas_kernels.nf4 import mosaic
from pallas_kernels.nf4.array import NF4Slice
from pallas_kernels.nf4.codebook import BLOCK
from pallas_kernels.nf4.grouped_launch import MOST, RANKS, ROWS, WARPS, launch
from pallas_kernels.nf4.matvec import nf4_matvec
from pallas_kernels.nf4.products import product
from pallas_kernels.triton_call import triton_obstacle

FEW = 64  # rows that packed weights are multiplied with as they are packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA factors of n linears of one input, for all L layers, in what is computed in; R ranks each, a multiple of 16.

    Ranks that a linear has not are zeros. A is transposed and has the scale in it. Of one linear by itself, whose z comes in
    summands, B is there as often, and A once.
    """

    a: Float[Array, "L n*R in"]
    b: Float[Array, "L out R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ready:
    """What mosaic.py reads beside codes, of all L layers."""

    scales: tuple[Float[Array, "L in/64 out_i"], ...]
    beside: Float[Array, "L out room"] | None


def ready(weights: Sequence[NF4Slice | jax.Array], b: Float[Array, "L out R"] | None, x: Any) -> Ready | None:
    """For `linears` with an input like `x`; None if they do not go by mosaic.py with so many rows. The weights' index is of no
    concern.
    """
    slices = [w for w in weights if isinstance(w, NF4Slice)]
    if x.shape[0] <= ROWS or x.shape[0] > FEW or _mosaic_obstacle(x, weights) is not None:
        return None
    scales = tuple(mosaic.scale_columns(one.stack) for one in slices)
    if b is None:
        return Ready(scales, None)
    return Ready(scales, jax.vmap(lambda layer: _beside(layer, [one.shape[0] for one in slices]))(b).astype(x.dtype))


def padded_rank(rank: int) -> int:
    return -(-rank // RANKS) * RANKS


def room_beside(x: jax.Array, weights: Sequence[NF4Slice | jax.Array], columns: int) -> int:
    """How many columns `linears` would have in x past its own, to hold the `columns` of z: the room for them, or none."""
    return room_for(columns) if x.shape[0] > ROWS and _mosaic_obstacle(x, weights) is None else 0


def linears(
    x: Float[Array, "m in+room"],
    weights: Sequence[NF4Slice | Float[Array, "out_i in"]],
    *,
    z: Float[Array, "m n*R"] | None = None,
    b: Float[Array, "L out R"] | None = None,
    layer: Any = 0,
    residual: Float[Array, "m out"] | None = None,
    made: Ready | None = None,
    implementation: str | None = None,
) -> Float[Array, "m out"]:
    """x [W_1; W_2; ..]^T + z_i B_i + residual in x's dtype, accumulated in float32; without derivatives.

    Args:
        weights: packed ones, all of the same `layer` of their stacks, or plain ones.
        z, b: LoRA's low-rank products, and the factors of all layers (see LowRank). z may be in x's room, in `summands`, and
            zeros past them.
        made: what `ready` makes of these weights and b, where it is kept.
        implementation: "triton" (up to 3 packed weights and 64 rows, 16-bit), "mosaic" (packed weights on Hopper, 16-bit,
            preferred for more than 16 rows) or "separate".
    """
    width = weights[0].shape[1]
    if (z is None and x.shape[1] == width) != (b is None) or (z is not None and x.shape[1] != width):
        raise ValueError("linears needs z and b together: LoRA's products, or room for them in x, and what they meet.")
    by_name = {"triton": _obstacle(x, weights, b), "mosaic": _mosaic_obstacle(x, weights)}
    order = ("triton", "mosaic") if x.shape[0] <= ROWS else ("mosaic", "triton")
    obstacles = {name: by_name[name] for name in order} | {"separate": None}
    chosen = choose_implementation("linears", implementation, obstacles)
    if z is None and b is not None and chosen != "mosaic":
        x, z = x[:, :width], _whole(x[:, width:], len(weights) * b.shape[-1])
    if chosen == "mosaic":
        slices = [w for w in weights if isinstance(w, NF4Slice)]
        if z is not None:
            spare = room_for(z.shape[1]) - z.shape[1]
            x = jnp.concatenate([x, jnp.pad(z.astype(x.dtype), ((0, 0), (0, spare)))], axis=1)
        if made is not None:
            y = mosaic.product(x, slices, made.beside, scales=made.scales)
        else:
            beside = None if b is None else _beside(b[layer], [one.shape[0] for one in slices]).astype(x.dtype)
            y = product(x, slices, beside, way="mosaic")
        return y if residual is None else y + residual
    if chosen == "triton":
        stacks = [w.stack for w in weights if isinstance(w, NF4Slice)]
        parts = []
        for start in range(0, x.shape[0], ROWS):
            own_x, own_z, added = (None if each is None else each[start : start + ROWS] for each in (x, z, residual))
            assert own_x is not None
            parts.append(launch(own_x, stacks, layer, own_z, b, added))
        return jnp.concatenate(parts)
    y = jnp.concatenate([_product(x, w) for w in weights], axis=1)
    if z is not None and b is not None:
        y += _low_rank(z, b[layer], [w.shape[0] for w in weights])
    return y if residual is None else y + residual


def _beside(b: Float[Array, "out R"], heights: list[int]) -> Float[Array, "out room"]:
    """LoRA's second factors of n linears as one: each row has its own linear's columns, and zeros in the others'. Each of z's
    summands meets the same.
    """
    owner = np.repeat(np.arange(len(heights)), heights)
    blocks = jnp.where(owner[:, None] == np.arange(len(heights)), b.T[:, :, None], 0)  # [R, out, n]
    one = blocks.transpose(1, 2, 0).reshape(b.shape[0], -1)
    room = room_for(one.shape[1])
    every = jnp.tile(one, (1, summands(room, one.shape[1])))
    return jnp.pad(every, ((0, 0), (0, room - every.shape[1])))


def _whole(parts: Float[Array, "m room"], count: int) -> Float[Array, "m n*R"]:
    """z, of its summands in x's room."""
    number = summands(parts.shape[1], count)
    each = parts[:, : number * count].reshape(-1, number, count)
    return jnp.sum(each.astype(jnp.float32), axis=1).astype(parts.dtype)


def _product(x: jax.Array, w: NF4Slice | jax.Array) -> jax.Array:
    if isinstance(w, NF4Slice):
        return nf4_matvec(x, w, implementation=None if x.shape[0] <= ROWS else "xla")
    return jnp.einsum("mi,oi->mo", x, w.astype(x.dtype), precision=exact_precision(x.dtype))


def _low_rank(z: Float[Array, "m n*R"], b: Float[Array, "out R"], heights: list[int]) -> Float[Array, "m out"]:
    parts = zip(
        jnp.split(z, len(heights), axis=1), np.split(np.arange(b.shape[0]), np.cumsum(heights)[:-1]), strict=True
    )
    precision = exact_precision(z.dtype)
    return jnp.concatenate(
        [jnp.einsum("mr,or->mo", part, b[rows[0] : rows[-1] + 1], precision=precision) for part, rows in parts], axis=1
    )


def _mosaic_obstacle(x: jax.Array, weights: Sequence[NF4Slice | jax.Array]) -> str | None:
    slices = [w for w in weights if isinstance(w, NF4Slice)]
    if len(slices) < len(weights):
        return "it takes packed weights"
    return mosaic.obstacle(x, slices)


def _obstacle(x: jax.Array, weights: Sequence[NF4Slice | jax.Array], b: jax.Array | None) -> str | None:
    """Why the kernel cannot multiply these here, or None."""
    stacks = [w.stack for w in weights if isinstance(w, NF4Slice)]
    if len(stacks) < len(weights) or any(stack.layout != "rows" for stack in stacks):
        return f"it takes packed weights in layout 'rows', whose width is a multiple of {BLOCK}"
    if not 1 <= x.shape[0] <= FEW:
        return f"it takes 1 to {FEW} rows, and {x.shape=} has {x.shape[0]}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {x.dtype}"
    first = stacks[0]
    if len(stacks) > MOST or any(
        (stack.nested_map, stack.double_quant, stack.nested_cell)
        != (first.nested_map, first.double_quant, first.nested_cell)
        for stack in stacks
    ):
        return f"it takes up to {MOST} weights that are packed alike"
    if b is not None and b.shape[-1] > RANKS * WARPS:
        return f"it takes LoRA of up to {RANKS * WARPS} ranks, not {b.shape[-1]}"
    return triton_obstacle()
