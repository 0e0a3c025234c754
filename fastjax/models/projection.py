"""Linears that read the same input, as one matrix product with their LoRA in it, and its backward pass by hand.

With weights W_i [out_i, in] stacked to W [out, in], LoRA factors side by side as A = [A_1 .. A_n] [in, R], block-diagonal
B = diag(B_1 .. B_n) [R, out], and scales s, one per column of A:

    z = s * (x A)                      y = x W^T + z B = [x z] [W B^T]^T        (+ bias)

With cotangent g of y, nothing but x and z is needed again:

    dz = s * (g B^T)                   dx = g W + dz A^T = [g dz] [W; A^T]
    dA = x^T dz                        dB = the diagonal blocks of z^T g

and, where the weights are trained, dW = g^T x. A linear without LoRA has no columns in A. Under dropout each LoRA reads
its own x, dropped by a mask that is drawn again in the backward pass (draws.py).

x and g come with room at the end of their rows (`room`), where z and dz are put in place; pallas_kernels.low_rank says
why. A linear's gradients go where it keeps its parameters: into a module like it, handed in as `gradients`.

On a mesh with an axis `tensor`, a device may have some columns of y (rows of W, columns of B; x and A are whole), or some
columns of x (columns of W, rows of A; B is whole). In the first case its dx, in the second its y is one summand of the
whole, and `sum_over` names the axis to sum it over. All else stays as above, of the columns that it has: dA in the first
case, dB in the second, are summands too, for the caller to sum.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.models.draws import Draw
from fastjax.models.layers import Linear
from pallas_kernels.dispatch import exact_precision
from pallas_kernels.low_rank import contract_rows, project_into, room_for
from pallas_kernels.nf4 import NF4Array, NF4Slice, product, unpack_slices
from pallas_kernels.nf4 import input_gradient as nf4_input_gradient

Draws = Sequence[Draw | None]
F32 = jnp.dtype(jnp.float32)


def room(linears: Sequence[Linear]) -> int:
    """Columns that x and g need past their own, for the low-rank operands."""
    return room_for(sum(linear.lora.a.shape[-1] for linear in _with_lora(linears)))


def apply_linears(
    linears: Sequence[Linear], x: Float[Array, "T in+room"], draws: Draws, *, sum_over: str | None = None
) -> tuple[Float[Array, "T out"], Float[Array, "T R"] | None]:
    """(y, z); z is None without LoRA. `draws`: one per linear, of its LoRA's dropout, or None for no dropout."""
    factors = Factors.of(linears, x.dtype)
    if factors is None:
        return _add_biases(linears, _summed(_product(linears, x, None), sum_over)), None
    x = _with_z(linears, factors, x, draws)
    inner, rank = factors.a.shape
    y = _summed(_product(linears, x, factors.b.T), sum_over)
    return _add_biases(linears, y), x[:, inner : inner + rank]


def input_gradient(
    linears: Sequence[Linear],
    gradients: Sequence[Linear],
    z: Float[Array, "T R"] | None,
    g: Float[Array, "T out+room"],
    draws: Draws,
    *,
    sum_over: str | None = None,
) -> tuple[Float[Array, "T in"], Float[Array, "T out+room"]]:
    """dx, and g with dz in its room; dB is set in `gradients`. Later readers of g take this one, g itself is gone."""
    factors = Factors.of(linears, g.dtype)
    if factors is None or z is None:
        return _summed(_pulled_back(linears, g, None), sum_over), g
    outer, rank = sum(factors.widths), factors.a.shape[1]
    g = project_into(g, factors.b.T, factors.scales)
    blocks = contract_rows(z, g, rank=rank, columns=outer)
    for linear, gradient, row, column in zip(
        linears, gradients, _ends(factors.ranks), _ends(factors.widths), strict=True
    ):
        if linear.lora is not None:
            height, width = linear.lora.b.shape
            block = blocks[row - height : row, column - width : column]
            gradient.lora.b.set_value(block.astype(linear.lora.b.dtype))
    if not any(_dropping(linears, draws)):
        return _summed(_pulled_back(linears, g, factors.a.T), sum_over), g
    dx = _contract(g[:, :outer], _weight(linears, g), (1, 0), F32)
    dz = factors.split(g[:, outer : outer + rank])
    for linear, draw, part, a in zip(linears, draws, dz, factors.split(factors.a), strict=True):
        if part is not None and a is not None:
            dx += _drop(linear, _contract(part, a, (1, 1), F32), draw)
    return _summed(dx.astype(g.dtype), sum_over), g


def parameter_gradients(
    linears: Sequence[Linear],
    gradients: Sequence[Linear],
    x: Float[Array, "T in"],
    g: Float[Array, "T out+room"],
    draws: Draws,
) -> None:
    """dA, and dW and bias gradients where those are trained, set in `gradients`; all are float32 sums. g holds dz."""
    widths = [columns_of(linear) for linear in linears]
    ranks = [linear.lora.a.shape[-1] for linear in _with_lora(linears)]
    if any(_dropping(linears, draws)):
        dz = g[:, sum(widths) : sum(widths) + sum(ranks)]
        dropped = [
            _drop(linear, x, draw) for linear, draw in zip(linears, draws, strict=True) if linear.lora is not None
        ]
        da = [_contract(each, part, (0, 0), F32) for each, part in zip(dropped, _columns(dz, ranks), strict=True)]
    elif ranks:
        da = _columns(contract_rows(g, x, rank=sum(ranks), start=sum(widths)).T, ranks)
    else:
        da = []
    for linear, gradient, block in zip(_with_lora(linears), _with_lora(gradients), da, strict=True):
        gradient.lora.a.set_value(block.astype(linear.lora.a.dtype))
    for linear, gradient, part in zip(linears, gradients, _columns(g, widths), strict=True):
        if isinstance(linear.weight, nnx.Param):
            gradient.weight.set_value(_contract(part, x, (0, 0), F32).astype(linear.weight.dtype))
        if isinstance(linear.bias, nnx.Param) and gradient.bias is not None:
            gradient.bias.set_value(jnp.sum(part, axis=0, dtype=F32).astype(linear.bias.dtype))


@dataclasses.dataclass(frozen=True)
class Factors:
    """The LoRA factors of several linears as two matrices."""

    a: Float[Array, "in R"]
    b: Float[Array, "R out"]
    scales: Float[Array, "R"]
    ranks: tuple[int, ...]  # of each linear, 0 without LoRA
    widths: tuple[int, ...]  # output columns of each linear

    @classmethod
    def of(cls, linears: Sequence[Linear], dtype: Any) -> "Factors | None":
        """None if no linear has LoRA."""
        loras = [linear.lora for linear in linears]
        if all(lora is None for lora in loras):
            return None
        ranks = tuple(0 if lora is None else lora.a.shape[-1] for lora in loras)
        widths = tuple(columns_of(linear) for linear in linears)
        present = [lora for lora in loras if lora is not None]
        a = jnp.concatenate([lora.a[...].astype(dtype) for lora in present], axis=1)
        scales = jnp.concatenate([jnp.broadcast_to(lora.scale[...], lora.a.shape[-1:]) for lora in present])
        rows = []
        for lora, column in zip(loras, itertools.accumulate(widths, initial=0), strict=False):
            if lora is not None:
                b = lora.b[...].astype(dtype)
                rows.append(jnp.pad(b, ((0, 0), (column, sum(widths) - column - b.shape[1]))))
        return cls(a, jnp.concatenate(rows, axis=0), scales, ranks, widths)

    def split(self, x: jax.Array) -> list[jax.Array | None]:
        """The columns of [..., R] that belong to each linear; None to one without LoRA."""
        return [part if rank else None for rank, part in zip(self.ranks, _columns(x, self.ranks), strict=True)]


def _with_z(linears: Sequence[Linear], factors: Factors, x: jax.Array, draws: Draws) -> jax.Array:
    """x [T, in+room] with z in its columns past `in`."""
    if not any(_dropping(linears, draws)):
        return project_into(x, factors.a, factors.scales)
    inner = factors.a.shape[0]
    parts = []
    for linear, draw, a in zip(linears, draws, factors.split(factors.a), strict=True):
        if a is not None:
            parts.append(linear.lora.scale[...] * _contract(_drop(linear, x[:, :inner], draw), a, (1, 0), F32))
    z = jnp.concatenate(parts, axis=1).astype(x.dtype)
    z = jnp.pad(z, ((0, 0), (0, x.shape[1] - inner - z.shape[1])))
    return jax.lax.dynamic_update_slice(x, z, (0, inner))


def _dropping(linears: Sequence[Linear], draws: Draws) -> list[bool]:
    return [
        linear.lora is not None and linear.lora.dropout > 0 and draw is not None
        for linear, draw in zip(linears, draws, strict=True)
    ]


def _drop(linear: Linear, x: jax.Array, draw: Draw | None) -> jax.Array:
    """x as this linear's LoRA reads it: a linear map, and its own transpose."""
    rate = linear.lora.dropout
    if not rate or draw is None:
        return x
    return jnp.where(draw.kept(x.shape[1], rate), x / (1 - rate), 0).astype(x.dtype)


def _product(linears: Sequence[Linear], x: jax.Array, beside: jax.Array | None) -> Float[Array, "T out"]:
    """x W^T, and what x has in its room times `beside`."""
    if (slices := _slices(linears)) is not None:
        return product(x, slices, beside)
    weight = _weight(linears, x)
    rest = x.shape[1] - weight.shape[1]
    if beside is not None:
        weight = jnp.concatenate([weight, jnp.pad(beside, ((0, 0), (0, rest - beside.shape[1])))], axis=1)
    return _contract(x[:, : weight.shape[1]], weight, (1, 1))


def _pulled_back(linears: Sequence[Linear], g: jax.Array, below: jax.Array | None) -> Float[Array, "T in"]:
    """g W, and what g has in its room times `below`."""
    if (slices := _slices(linears)) is not None:
        return nf4_input_gradient(g, slices, below)
    weight = _weight(linears, g)
    rest = g.shape[1] - weight.shape[0]
    if below is not None:
        weight = jnp.concatenate([weight, jnp.pad(below, ((0, rest - below.shape[0]), (0, 0)))])
    return _contract(g[:, : weight.shape[0]], weight, (1, 0))


def _weight(linears: Sequence[Linear], after: jax.Array) -> Float[Array, "out in"]:
    """W in the dtype of `after`, which has to be there before a packed weight is unpacked."""
    if (slices := _slices(linears)) is not None:
        return unpack_slices(slices, after.dtype, after=after)
    return jnp.concatenate([linear.weight.get_value().astype(after.dtype) for linear in linears])


def _slices(linears: Sequence[Linear]) -> list[NF4Slice] | None:
    """The weights, if they are packed."""
    weights = [linear.weight.get_value() for linear in linears]
    return [_slice(w) for w in weights] if isinstance(weights[0], NF4Array | NF4Slice) else None


def _summed(part: jax.Array, axis: str | None) -> jax.Array:
    return part if axis is None else jax.lax.psum(part, axis)


def _slice(weight: NF4Array | NF4Slice) -> NF4Slice:
    if isinstance(weight, NF4Slice):
        return weight
    return NF4Slice(jax.tree.map(lambda leaf: leaf[None], weight), jnp.int32(0))


def columns_of(linear: Linear) -> int:
    """Columns of its y."""
    return linear.weight.get_value().shape[-2]


def inputs_of(linear: Linear) -> int:
    """Columns of its x."""
    return linear.weight.get_value().shape[-1]


def _add_biases(linears: Sequence[Linear], y: jax.Array) -> jax.Array:
    if all(linear.bias is None for linear in linears):
        return y
    biases = [
        jnp.zeros(columns_of(linear), y.dtype) if linear.bias is None else linear.bias[...].astype(y.dtype)
        for linear in linears
    ]
    return y + jnp.concatenate(biases)[None]


def _with_lora(linears: Sequence[Linear]) -> list[Linear]:
    return [linear for linear in linears if linear.lora is not None]


def _ends(widths: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(widths))


def _columns(x: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """The first columns of x in parts."""
    return [x[:, end - width : end] for width, end in zip(widths, _ends(widths), strict=True)]


def _contract(x: jax.Array, y: jax.Array, axes: tuple[int, int], out: Any = None) -> jax.Array:
    """One axis of each contracted, in float32, to x's dtype or `out`."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=exact_precision(x.dtype), preferred_element_type=jnp.dtype(out or x.dtype)
    )
