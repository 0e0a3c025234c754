"""Linears that read the same input, as one matrix product with their LoRA folded in, and its backward pass by hand.

With weights W_i [out_i, in] stacked to W [out, in], LoRA factors side by side as A = [A_1 .. A_n] [in, R], block-diagonal
B = diag(B_1 .. B_n) [R, out], and scales s, one per column of A:

    z = s * (x A)                      y = x W^T + z B  (+ bias) (+ residual)

With cotangent g of y, nothing but x and z is needed again:

    dz = s * (g B^T)                   dx = g W + dz A^T
    dA = x^T dz                        dB = the diagonal blocks of z^T g

and, where the weights are trained, dW = g^T x. A linear without LoRA has no columns in A. Under dropout each LoRA reads
its own x, dropped by a mask that its key makes again in the backward pass.

A linear's gradients go where it keeps its parameters: into a module like it, handed in as `gradients`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.models._pieces import low_rank_gradients, low_rank_project, matmul_nn, matmul_nt
from fastjax.models.layers import Linear
from pallas_kernels import NF4Array, dequantize_nf4
from pallas_kernels.dispatch import exact_precision
from pallas_kernels.nf4.matmul import _after as unpack_after

Keys = Sequence[jax.Array | None]


def apply_linears(
    linears: Sequence[Linear], x: Float[Array, "T in"], keys: Keys, residual: Float[Array, "T out"] | None = None
) -> tuple[Float[Array, "T out"], Float[Array, "T R"] | None]:
    """(y, z); z is None without LoRA. `keys`: one per linear, of its LoRA's dropout, or None for no dropout."""
    factors = _Factors.of(linears, x.dtype)
    z = None if factors is None else _project(linears, factors, x, keys)
    y = matmul_nt(x, _weight(linears, x), z=z, b=None if factors is None else factors.b, residual=residual)
    return _add_biases(linears, y), z


def input_gradient(
    linears: Sequence[Linear],
    gradients: Sequence[Linear],
    z: Float[Array, "T R"] | None,
    g: Float[Array, "T out"],
    keys: Keys,
) -> tuple[Float[Array, "T in"], Float[Array, "T R"] | None]:
    """(dx, dz); dB is set in `gradients`, as it reads what dz reads."""
    factors = _Factors.of(linears, g.dtype)
    if factors is None or z is None:
        return matmul_nn(g, _weight(linears, g)), None
    dz, db = low_rank_gradients(z, g, factors.b, factors.scales, factors.ranks, factors.widths)
    for linear, gradient, block in zip(_with_lora(linears), _with_lora(gradients), db, strict=True):
        gradient.lora.b.set_value(block.astype(linear.lora.b.dtype))
    if not any(_dropping(linears, keys)):
        return matmul_nn(g, _weight(linears, g), dz=dz, a=factors.a), dz
    dx = matmul_nn(g, _weight(linears, g)).astype(jnp.float32)
    for linear, key, part, a in zip(linears, keys, factors.split(dz), factors.split(factors.a), strict=True):
        if part is not None and a is not None:
            dx += _drop(linear, _contract(part, a, (1, 1), jnp.dtype(jnp.float32)), key)
    return dx.astype(g.dtype), dz


def parameter_gradients(
    linears: Sequence[Linear],
    gradients: Sequence[Linear],
    x: Float[Array, "T in"],
    dz: Float[Array, "T R"] | None,
    g: Float[Array, "T out"],
    keys: Keys,
) -> None:
    """dA, and dW and bias gradients where those are trained, set in `gradients`; all are float32 sums."""
    f32 = jnp.dtype(jnp.float32)
    if dz is not None:
        ranks = [linear.lora.a.shape[-1] for linear in _with_lora(linears)]
        parts = _columns(dz, ranks)
        if any(_dropping(linears, keys)):
            lora_keys = [key for linear, key in zip(linears, keys, strict=True) if linear.lora is not None]
            dropped = [_drop(linear, x, key) for linear, key in zip(_with_lora(linears), lora_keys, strict=True)]
            da = [_contract(x, part, (0, 0), f32) for x, part in zip(dropped, parts, strict=True)]
        else:
            da = _columns(_contract(x, dz, (0, 0), f32), ranks)
        for linear, gradient, block in zip(_with_lora(linears), _with_lora(gradients), da, strict=True):
            gradient.lora.a.set_value(block.astype(linear.lora.a.dtype))
    for linear, gradient, part in zip(linears, gradients, _columns(g, [_out(l) for l in linears]), strict=True):
        if isinstance(linear.weight, nnx.Param):
            gradient.weight.set_value(_contract(part, x, (0, 0), f32).astype(linear.weight.dtype))
        if isinstance(linear.bias, nnx.Param):
            gradient.bias.set_value(jnp.sum(part, axis=0, dtype=f32).astype(linear.bias.dtype))


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The LoRA factors of several linears as two matrices."""

    a: Float[Array, "in R"]
    b: Float[Array, "R out"]
    scales: Float[Array, "R"]
    ranks: tuple[int, ...]  # of each linear, 0 without LoRA
    widths: tuple[int, ...]  # output columns of each linear

    @classmethod
    def of(cls, linears: Sequence[Linear], dtype: Any) -> "_Factors | None":
        """None if no linear has LoRA."""
        loras = [linear.lora for linear in linears]
        if all(lora is None for lora in loras):
            return None
        ranks = tuple(0 if lora is None else lora.a.shape[-1] for lora in loras)
        widths = tuple(_out(linear) for linear in linears)
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


def _project(linears: Sequence[Linear], factors: _Factors, x: jax.Array, keys: Keys) -> jax.Array:
    if not any(_dropping(linears, keys)):
        return low_rank_project(x, factors.a, factors.scales)
    parts = [
        low_rank_project(_drop(linear, x, key), a, s[0])
        for linear, key, a, s in zip(
            linears, keys, factors.split(factors.a), factors.split(factors.scales[None]), strict=True
        )
        if a is not None and s is not None
    ]
    return jnp.concatenate(parts, axis=1)


def _dropping(linears: Sequence[Linear], keys: Keys) -> list[bool]:
    return [
        linear.lora is not None and linear.lora.dropout > 0 and key is not None
        for linear, key in zip(linears, keys, strict=True)
    ]


def _drop(linear: Linear, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """x as this linear's LoRA reads it. Linear in x, and its own transpose."""
    rate = linear.lora.dropout
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _weight(linears: Sequence[Linear], after: jax.Array) -> Float[Array, "out in"]:
    """W in the dtype of `after`, which has to be there before a packed weight is unpacked (see unpack_after)."""
    weights = [linear.weight.get_value() for linear in linears]
    whole = [
        dequantize_nf4(unpack_after(after, weight), after.dtype)
        if isinstance(weight, NF4Array)
        else weight.astype(after.dtype)
        for weight in weights
    ]
    return whole[0] if len(whole) == 1 else jnp.concatenate(whole, axis=0)


def _out(linear: Linear) -> int:
    return linear.weight.get_value().shape[-2]


def _add_biases(linears: Sequence[Linear], y: jax.Array) -> jax.Array:
    if all(linear.bias is None for linear in linears):
        return y
    biases = [
        jnp.zeros(_out(linear), y.dtype) if linear.bias is None else linear.bias[...].astype(y.dtype)
        for linear in linears
    ]
    return y + jnp.concatenate(biases)[None]


def _with_lora(linears: Sequence[Linear]) -> list[Linear]:
    return [linear for linear in linears if linear.lora is not None]


def _columns(x: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """x [..., sum of widths] in parts."""
    return [x[:, end - width : end] for width, end in zip(widths, itertools.accumulate(widths), strict=True)]


def _contract(x: jax.Array, y: jax.Array, axes: tuple[int, int], out: jnp.dtype) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=exact_precision(x.dtype), preferred_element_type=out)
