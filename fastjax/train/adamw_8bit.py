"""Adam with moments in 32 or in 8 bits, as an Optax transformation.

With gradient g at step t = 1, 2, ...:

    m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2
    update = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

which is torch.optim.AdamW's direction (eps outside the root, after the bias correction); decay and learning rate
follow in the chain. `quantize` says which parameters keep m and v as blocks of 8-bit codes, m with the signed map, v
with the unsigned one. Their update is computed in float32 from the dequantised moments of the last step, and uses the
new m and v before they are rounded. This is bitsandbytes' 8-bit AdamW, 2.03 bytes of state a parameter in place of 8,
but for one rule: a v above zero is never stored as zero. Where gradients of very different size share a block, nearest
rounding does that to the small ones, and a later, smaller gradient meets a live m over a v of next to nothing: steps of
1000 times the learning rate, where with the rule (a v too large, a step too small) they stay below 3 times.

One implementation serves both sizes, and optax.scale_by_adam neither: it forms 1 - b2^t in float32, which at t = 1 is
off by 1e-5 of its value, and it relies on implicit dtype promotion. Here 1 - b^t = -expm1(t log b).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastjax.train.blockwise_8bit import Blockwise8bit, dequantize_blockwise, quantize_blockwise, zeros_blockwise

MIN_8BIT_SIZE = 4096  # bitsandbytes' min_8bit_size: below it there is little to save
KeyPath = tuple[Any, ...]
Moment = jax.Array | Blockwise8bit


class AdamState(NamedTuple):
    """`m` and `v` are trees like the parameters', of float32 arrays or `Blockwise8bit`."""

    count: jax.Array
    m: Any
    v: Any


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    quantize: Callable[[KeyPath, jax.Array], bool] | None = None,
) -> optax.GradientTransformation:
    """Adam's direction. `quantize(path, param)`: whether this parameter's moments are kept in 8 bits; None: nowhere."""

    def init(params: optax.Params) -> AdamState:
        def zeros(signed: bool) -> Any:
            def moment(path: KeyPath, param: jax.Array) -> Moment:
                if quantize and quantize(path, param):
                    return zeros_blockwise(param.shape, signed=signed)
                return jnp.zeros(param.shape, jnp.float32)

            return jax.tree_util.tree_map_with_path(moment, params)

        return AdamState(count=jnp.zeros((), jnp.int32), m=zeros(signed=True), v=zeros(signed=False))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1
        corrections = _bias_correction(b1, count), _bias_correction(b2, count)
        gradients, tree = jax.tree.flatten(updates)
        moments = zip(gradients, tree.flatten_up_to(state.m), tree.flatten_up_to(state.v), strict=True)
        new = [_update_leaf(g, m, v, (b1, b2), corrections, eps) for g, m, v in moments]
        directions, ms, vs = (tree.unflatten(leaf[i] for leaf in new) for i in range(3))
        return directions, AdamState(count, ms, vs)

    return optax.GradientTransformation(init, update)


def _update_leaf(
    g: jax.Array,
    m: Moment,
    v: Moment,
    decays: tuple[float, float],
    corrections: tuple[jax.Array, jax.Array],
    eps: float,
) -> tuple[jax.Array, Moment, Moment]:
    (b1, b2), (correction1, correction2) = decays, corrections
    g32 = g.astype(jnp.float32)
    new_m = b1 * _values(m) + (1 - b1) * g32
    new_v = b2 * _values(v) + (1 - b2) * jnp.square(g32)
    direction = new_m / correction1 / (jnp.sqrt(new_v / correction2) + eps)
    return direction.astype(g.dtype), _like(m, new_m), _like(v, new_v)


def _bias_correction(decay: float, count: jax.Array) -> jax.Array:
    """1 - decay^count without cancellation."""
    if decay == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))


def _values(moment: Moment) -> jax.Array:
    return dequantize_blockwise(moment) if isinstance(moment, Blockwise8bit) else moment


def _like(moment: Moment, values: jax.Array) -> Moment:
    return quantize_blockwise(values, signed=moment.signed) if isinstance(moment, Blockwise8bit) else values
