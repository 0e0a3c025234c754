"""The layers every family shares: a linear that may be packed to 4 bits and carry LoRA, a norm, an embedding.

Parameters are nnx Variables: `nnx.Param` is trained, `Frozen` is not, and a training step differentiates the first kind
alone. Inside the decoder layers every Variable has a leading layer axis; the model slices it off before a layer runs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.parallel.collectives import sum_parts
from pallas_kernels import NF4Array, nf4_matmul, rms_norm


class Frozen(nnx.Variable):
    """A parameter that is never trained nor differentiated: a base weight, packed or not."""


Weights = Mapping[str, jax.Array | NF4Array]
VariableType = type[nnx.Variable]


def dense_matmul(x: Float[Array, "... in"], weight: Float[Array, "out in"]) -> Float[Array, "... out"]:
    """x @ weight^T in x's dtype. float32 is computed as float32: the GPU's default would round it to tf32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision)


class Linear(nnx.Module):
    """y = x W^T + b, plus what `lora` adds when it is there."""

    def __init__(self, weights: Weights, name: str, variable: VariableType) -> None:
        self.weight = variable(weights[f"{name}.weight"])
        bias = weights.get(f"{name}.bias")
        self.bias = nnx.data(None if bias is None else variable(bias))
        self.lora: Any = nnx.data(None)  # a fastjax.lora.LoRA, put there by add_lora

    def __call__(self, x: Float[Array, "... in"], dropout_key: jax.Array | None = None) -> Float[Array, "... out"]:
        weight = self.weight.get_value()
        y = nf4_matmul(x, weight) if isinstance(weight, NF4Array) else dense_matmul(x, weight)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)
        if self.lora is not None:
            y = y + self.lora(x, dropout_key)
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) * weight."""

    def __init__(self, weights: Weights, name: str, variable: VariableType, eps: float) -> None:
        self.weight = variable(weights[f"{name}.weight"])
        self.eps = eps

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        return rms_norm(x, self.weight[...], self.eps)


class Embedding(nnx.Module):
    """A row per token."""

    def __init__(self, weights: Weights, name: str, variable: VariableType) -> None:
        self.weight = variable(weights[f"{name}.weight"])

    def __call__(
        self, tokens: Int[Array, "B S"], dtype: jnp.dtype, words_over: str | None = None
    ) -> Float[Array, "B S H"]:
        """`words_over`: the mesh axis whose device i holds the rows of words [i V, (i + 1) V), inside shard_map."""
        weight = self.weight[...]
        if words_over is None:
            return weight[tokens].astype(dtype)
        own = tokens - weight.shape[0] * jax.lax.axis_index(words_over)
        found = weight.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return sum_parts(found.astype(dtype), words_over)
