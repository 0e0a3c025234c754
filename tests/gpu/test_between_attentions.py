"""A layer of one and two tokens in one launch, on a GPU, against the ops that it stands for, and again and again."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.between_attentions import Layers, between_attentions, new_counts, obstacle
from tests.pallas_kernels.between_attentions import EPS, random_layers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "rank"), [(1, 16), (2, 16), (1, 0)])
def test_a_layer_in_one_launch(rows: int, rank: int) -> None:
    layers = random_layers(4096, 4096, 14336, 1024, rank, jnp.bfloat16, copies=4)
    x, o = (jax.random.normal(jax.random.key(i), (rows, 4096), jnp.bfloat16) for i in range(2))
    if (reason := obstacle(x, layers)) is not None:
        pytest.skip(reason)

    def run(implementation, x, o, arrays, layer):
        layers = Layers(*arrays, eps=EPS)
        return between_attentions(x, o, layers, layer, new_counts(2), implementation=implementation)

    once, apart = (jax.jit(partial(run, name)) for name in ("triton", "separate"))
    arrays = tuple(layers)[:4]
    for layer in range(2):
        got, expected = (each(x, o, arrays, jnp.int32(layer)) for each in (once, apart))
        for a, b in list(zip(got, expected, strict=True))[: 2 if layer == 0 else 1]:
            error = jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32))
            assert float(error) < 0.02
        for _ in range(50):
            again = once(x, o, arrays, jnp.int32(layer))
            assert bool((again[0] == got[0]).all())
