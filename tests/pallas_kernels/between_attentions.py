"""Layers for tests of `between_attentions`, and what it should make of them, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.between_attentions import Layers
from pallas_kernels.nf4 import LowRank, NF4Array, dequantize_nf4, quantize_nf4

EPS = 1e-5


def random_layers(
    hidden: int, width: int, inner: int, kv_width: int, rank: int, dtype, layers: int = 2, copies: int = 1
) -> Layers:
    """`copies` of the second factor lie side by side where a linear is by itself, of which the first counts."""
    rng = np.random.default_rng(hidden + inner)

    def stack(out: int, into: int) -> NF4Array:
        each = [quantize_nf4(jnp.asarray(rng.normal(size=(out, into)) / into**0.5, jnp.float32)) for _ in range(layers)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    groups = (
        [stack(hidden, width)],
        [stack(inner, hidden), stack(inner, hidden)],
        [stack(hidden, inner)],
        [stack(width, hidden), stack(kv_width, hidden), stack(kv_width, hidden)],
    )
    factors = []
    for group in groups:
        out, into = sum(each.shape[-2] for each in group), group[0].shape[-1]
        a = rng.normal(size=(layers, len(group) * rank, into)) / into**0.5
        b = np.tile(rng.normal(size=(layers, out, rank)) / max(rank, 1), (1, 1, copies if len(group) == 1 else 1))
        factors.append(LowRank(jnp.asarray(a, dtype), jnp.asarray(b, dtype)) if rank else None)
    norms = [jnp.asarray(rng.uniform(0.5, 2, (layers, hidden)), jnp.float32) for _ in range(2)]
    return Layers(groups, tuple(factors), *norms, eps=EPS)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def expected(x: jax.Array, o: jax.Array, layers: Layers, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, qkv) with what is passed on rounded as the kernel rounds it."""

    def rounded(numbers: np.ndarray) -> np.ndarray:
        return wide(jnp.asarray(numbers, x.dtype))

    def multiply(place: int, u: np.ndarray, index: int) -> np.ndarray:
        parts, group, factors = [], layers.weights[place], layers.factors[place]
        first = 0
        for i, stack in enumerate(group):
            levels = dequantize_nf4(jax.tree.map(lambda leaf: leaf[index], stack), jnp.float32)
            y = u @ wide(levels).T
            height = y.shape[1]
            if factors is not None:
                rank = factors.a.shape[1] // len(group)
                z = rounded(u @ wide(factors.a)[index, i * rank : (i + 1) * rank].T)
                y += z @ wide(factors.b)[index, first : first + height, :rank].T
            first += height
            parts.append(y)
        return np.concatenate(parts, axis=1)

    def norm(u: np.ndarray, weight: np.ndarray) -> np.ndarray:
        scaled = rounded(u / np.sqrt(np.mean(u**2, axis=1, keepdims=True) + layers.eps))
        return rounded(scaled * rounded(weight))

    m = rounded(wide(x) + multiply(0, wide(o), layer))
    gate, up = np.split(rounded(multiply(1, norm(m, wide(layers.mlp_norm)[layer]), layer)), 2, axis=1)
    y = rounded(m + multiply(2, rounded(gate / (1 + np.exp(-gate)) * up), layer))
    if layer + 1 == len(layers.mlp_norm):
        return y, np.zeros((0,))
    return y, multiply(3, norm(y, wide(layers.qkv_norm)[layer + 1]), layer + 1)
