"""A sum over devices whose bytes on the wire are codes of 8 or 4 bits, with what rounding loses paid back at the next one.

Inside shard_map, n devices each hold a flat vector x of float32 and want the sum of all. As in a ring all-reduce the sum is
a reduce-scatter and an all-gather, but what travels is blocks of 32 values as integer codes and one bfloat16 scale:

    y        = x + owed                              this device's vector, and what it has yet to send of earlier ones
    sent     = codes(y), in n parts                  all_to_all: device i gets part i of every device, as bytes
    part     = sum of n decoded parts, in float32, + owed by the owner of part i
    shared   = codes(part)                           all_gather: everyone decodes the same bytes, so all results are equal
    owed     = y - sent,  by the owner  part - shared

so that over any number of steps the sums that came out, plus what is owed, are the true sums: the error does not grow
with the steps, and its mean goes to zero. A code is round(y / scale), cut to -8 ... 7 or -128 ... 127, and the scale is the
value of the block that lies farthest from zero, sign and all, / -8 or / -128: all codes are used, that value is exact but
for the rounding of the scale, and only a near equal of the other sign is off by more than half a scale, by little more than
one. A linear code costs no table, and in blocks of 32 it comes as near to normal values as the codebook of NF4 does.

Bytes a value: 4 bits 0.5625, 8 bits 1.0625, each twice, where an all-reduce of bfloat16 sends 2 twice: 0.28 and 0.53 of it.

What is owed belongs to gradients of a step's own weight: `weight` divides x before and multiplies the sum after, so that
what a step of many tokens leaves does not weigh more in a step of few. A value that is not finite makes its whole block
so, on every device: the step that follows sees it, as it would in a full sum, and must keep what was owed before.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from fastjax.errors import UserError
from fastjax.parallel.mesh import standard_mesh, summing_devices

BLOCK = 32
SCALE_BYTES = 2  # bfloat16, which has the range of float32
BITS = {"8bit": 8, "4bit": 4}
REDUCTIONS = ("full", *BITS)
# a scale below it may have no inverse: its block counts as zeros, and is owed
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sent", "shared"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Owed:
    """What the codes of earlier sums left out. A row a device of the mesh; P is the padded length of the vector."""

    sent: Float32[Array, "devices P"]  # by each device, of its own vector
    shared: Float32[Array, "devices P/n"]  # by the owner of a part, of the sum


def bits_of(reduction: str, devices: int) -> int | None:
    """The bits of a code; None for a sum in full. `devices` is how many take part in the sum."""
    if reduction not in REDUCTIONS:
        raise UserError(f"gradient_reduction={reduction!r} is unknown: it must be one of {', '.join(REDUCTIONS)}.")
    if reduction == "full":
        return None
    if devices == 1:
        raise UserError(
            f"gradient_reduction={reduction!r} compresses what devices send each other, and one device has nothing to send:"
            " leave it out, or split the batch over more devices, such as with mesh.data."
        )
    return BITS[reduction]


def padded_size(size: int, devices: int) -> int:
    """The length a vector is filled up to: whole blocks for each device."""
    return math.ceil(size / (devices * BLOCK)) * devices * BLOCK


def owed_shapes(size: int, devices: int, rows: int = 1) -> Owed:
    """Of a vector of `size` values a device, summed over so many devices."""
    padded = padded_size(size, devices)
    return Owed(*(jax.ShapeDtypeStruct((rows, each), jnp.float32) for each in (padded, padded // devices)))  # pyright: ignore[reportArgumentType]


def nothing_owed(size: int, devices: int, mesh: Mesh) -> Owed:
    """Of a vector of `size` values a device, summed over `devices` of the mesh's: zeros, each row on its own device."""
    shapes = owed_shapes(size, devices, rows=mesh.size)
    zeros = lambda: jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes)  # noqa: E731
    return jax.jit(zeros, out_shardings=NamedSharding(mesh, per_device(mesh)))()


def initial_debt(params: Any, mesh: Mesh | None, reduction: str) -> Owed | None:
    """Of gradients like these parameters; None where they are summed in full."""
    devices = summing_devices(mesh)
    if bits_of(reduction, devices) is None or mesh is None:
        return None
    return nothing_owed(sum(leaf.size for leaf in jax.tree.leaves(params)), devices, standard_mesh(mesh))


def per_device(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Of an array with one row for each device."""
    return PartitionSpec(tuple(mesh.axis_names))


def sum_gradients(total: Any, owed: Owed, scale: jax.Array, axes: Sequence[str], bits: int) -> tuple[Any, Owed]:
    """(gradients times `scale`, (loss, tokens)) summed over mesh axes, the gradients as codes, and what is then owed."""
    grads, (loss_sum, tokens) = total
    loss_sum, tokens = jax.lax.psum((loss_sum, tokens), tuple(axes))
    grads, owed = sum_tree(grads, owed, scale * jnp.maximum(tokens, 1), axes, bits)
    return (grads, (loss_sum, tokens)), owed


def sum_tree(tree: Any, owed: Owed, weight: jax.Array, axes: Sequence[str], bits: int) -> tuple[Any, Owed]:
    """The sum over mesh axes of a tree of float32 arrays, and what is then owed; `owed` holds this device's rows."""
    flat, restore = ravel_pytree(tree)
    own = jax.tree.map(lambda row: row[0], owed)
    total, own = sum_vector(flat / weight, own, axes, bits)
    return restore(total * weight), jax.tree.map(lambda row: row[None], own)


def sum_vector(x: Float32[Array, "N"], owed: Owed, axes: Sequence[str], bits: int) -> tuple[Float32[Array, "N"], Owed]:
    """As the module says; `owed` holds this device's two vectors."""
    axes, n = tuple(axes), owed.sent.size // owed.shared.size
    y = (jnp.pad(x, (0, owed.sent.size - x.size)) + owed.sent).reshape(n, -1)
    sent = encode(y, bits)
    received = jax.lax.all_to_all(sent, axes, split_axis=0, concat_axis=0, tiled=True)
    part = decode(received, bits).sum(axis=0) + owed.shared
    shared = encode(part[None], bits)
    total = decode(jax.lax.all_gather(shared, axes, axis=0, tiled=True), bits)
    left = Owed((y - decode(sent, bits)).reshape(-1), part - decode(shared, bits)[0])
    return total.reshape(-1)[: x.size], left


def encode(x: Float32[Array, "n C"], bits: int) -> UInt8[Array, "n M"]:
    """Rows of whole blocks as messages: all codes of a row, then all its scales."""
    blocks = x.reshape(len(x), -1, BLOCK)
    highest, lowest, levels = blocks.max(axis=-1), blocks.min(axis=-1), 2 ** (bits - 1)
    scales = (jnp.where(highest > -lowest, highest, lowest) / -levels).astype(jnp.bfloat16)
    wide = scales.astype(jnp.float32)[..., None]
    codes = jnp.round(blocks * jnp.where(jnp.abs(wide) < SMALLEST, 0.0, 1 / wide))
    codes = jnp.clip(codes, -levels, levels - 1).astype(jnp.int8)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if bits == 4:  # the first half of a block in the low bits of its bytes, the second in the high ones
        codes = (codes[..., : BLOCK // 2] & 15) | (codes[..., BLOCK // 2 :] << 4)
    scales = jax.lax.bitcast_convert_type(scales, jnp.uint8)
    return jnp.concatenate([codes.reshape(len(x), -1), scales.reshape(len(x), -1)], axis=1)


def decode(message: UInt8[Array, "n M"], bits: int) -> Float32[Array, "n C"]:
    """The values that `encode` made a message of, rounded as it says."""
    n, block_bytes = len(message), BLOCK * bits // 8
    blocks = message.shape[1] // (block_bytes + SCALE_BYTES)
    codes, scales = jnp.split(message, [blocks * block_bytes], axis=1)
    codes = jax.lax.bitcast_convert_type(codes.reshape(n, blocks, block_bytes), jnp.int8)
    if bits == 4:  # shifting back and forth brings the sign along
        codes = jnp.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
    scales = jax.lax.bitcast_convert_type(scales.reshape(n, blocks, SCALE_BYTES), jnp.bfloat16)
    return (codes.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]).reshape(n, -1)
