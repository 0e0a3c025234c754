"""Packed weights for tests on a mesh, laid out as a loader lays them out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastjax.models import LlamaConfig, init_weights, param_specs
from fastjax.weights.placement import make_target, pack, shardings_of


def drawn_weights(config: LlamaConfig, mesh: Mesh | None, dense: str = "none of them") -> dict[str, Any]:
    """Packed as a loader packs them, each share where it belongs; biases are drawn too."""
    weights: dict[str, Any] = init_weights(config, jax.random.key(0))
    for index, (name, spec) in enumerate(param_specs(config).items()):
        target = make_target(spec, quantize=spec.quantize and dense not in name, dtype=jnp.float32, mesh=mesh)
        value = weights[name]
        if spec.init == "zeros":
            value = 0.1 * jax.random.normal(jax.random.key(index), value.shape)
        if target.quantize:
            layers = [pack(target, layer) for layer in value]
            value = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        weights[name] = value if mesh is None else jax.device_put(value, shardings_of(target, value))
    return weights
