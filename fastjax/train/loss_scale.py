"""Loss scaling, and what happens to a step whose gradients are not finite: pure functions for use inside the step.

float16 ends at 65504 and loses bits below 6e-5, so the loss is multiplied by `scale` before the backward pass and the
gradients divided by it after. The scale is about the largest power of two that works: halved when a gradient is not
finite, doubled after `growth_interval` good steps. bfloat16 and float32 have range enough; their scale is 1 and stays.

    loss, grads = value_and_grad(lambda ...: loss * loss_scale.scale)
    grads = loss_scale.unscale(grads)
    finite = all_finite(grads)                       inside shard_map: of every shard, so combine with lax.pmin
    state = select_tree(finite, new_state, state)    a bad step changes nothing ...
    loss_scale = loss_scale.adjust(finite)           ... but the scale
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

INITIAL_SCALE = 2.0**15


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("scale", "good_steps"),
    meta_fields=("dynamic", "growth_interval", "factor", "minimum", "maximum"),
)
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The scale now, and the good steps since it last changed. Powers of two, so that scaling rounds nothing."""

    scale: Float32[Array, ""]
    good_steps: Int32[Array, ""]
    dynamic: bool
    growth_interval: int = 2000
    factor: float = 2.0
    minimum: float = 1.0
    maximum: float = 2.0**24

    def unscale(self, grads: Any) -> Any:
        """The gradients of the loss itself."""
        if not self.dynamic:
            return grads
        inverse = 1 / self.scale
        return jax.tree.map(lambda g: g * inverse.astype(g.dtype), grads)

    def adjust(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale for the next step, given whether this one's gradients were all finite."""
        if not self.dynamic:
            return self
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grows = good_steps >= self.growth_interval
        scale = jnp.where(grows, self.scale * self.factor, jnp.where(finite, self.scale, self.scale / self.factor))
        return dataclasses.replace(
            self,
            scale=jnp.clip(scale, self.minimum, self.maximum),
            good_steps=jnp.where(grows, 0, good_steps),
        )


def init_loss_scale(dtype: jax.typing.DTypeLike) -> LossScale:
    """The loss scale for a compute dtype: dynamic from 2^15 for float16, 1 for bfloat16 and float32."""
    dynamic = jnp.dtype(dtype) == jnp.float16
    scale = INITIAL_SCALE if dynamic else 1.0
    return LossScale(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32), dynamic=dynamic)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no floating-point leaf holds an infinity or a NaN."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in floats), jnp.asarray(True))


def select_tree(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the step was finite, else `old`; the trees must agree in structure, shapes and dtypes."""
    return jax.tree.map(lambda n, o: jax.lax.select(finite, n, o), new, old)
