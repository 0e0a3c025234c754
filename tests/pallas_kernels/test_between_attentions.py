"""How a layer's work is cut for one launch, and what cannot be; tests/pallas_kernels/ptx runs the kernel itself."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.between_attentions import Factors, Layers, between_attentions, new_counts, obstacle
from pallas_kernels.between_attentions.op import work_of_layer
from pallas_kernels.nf4 import NF4Array, quantize_nf4
from tests.pallas_kernels.between_attentions import expected, random_layers, wide


def packed(out: int, into: int) -> NF4Array:
    return jax.eval_shape(quantize_nf4, jax.ShapeDtypeStruct((4, out, into), jnp.float32))


def layers_of(hidden: int, inner: int, kv_width: int, rank: int = 16) -> Layers:
    groups = (
        [packed(hidden, hidden)],
        [packed(inner, hidden)] * 2,
        [packed(hidden, inner)],
        [packed(hidden, hidden), packed(kv_width, hidden), packed(kv_width, hidden)],
    )

    def factors(group: list[NF4Array]) -> Factors:
        out, into = sum(each.shape[-2] for each in group), group[0].shape[-1]
        shapes = (4, len(group) * rank, into), (4, out, rank * (4 if len(group) == 1 else 1))
        return Factors(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))

    norm = jax.ShapeDtypeStruct((4, hidden), jnp.float32)
    return Layers(groups, tuple(factors(group) if rank else None for group in groups), norm, norm, eps=1e-5)


@pytest.mark.parametrize(
    ("hidden", "inner", "kv_width", "most"),
    [(4096, 14336, 1024, 132), (4096, 14336, 1024, 78), (8192, 28672, 1024, 132)],  # 8B on two GPUs, 70B
)
def test_every_program_has_its_share(hidden, inner, kv_width, most) -> None:
    """All wait for each other: each has turns of every product, and both halves of the MLP's outputs."""
    work = work_of_layer(1, hidden, layers_of(hidden, inner, kv_width), most)
    assert work is not None
    assert work.programs <= most
    for product in (work.o, work.mlp, work.down, work.qkv):
        assert product.programs == work.programs <= product.turns
        assert product.per % product.tall == 0
        assert product.chunk * product.chunks == product.blocks
        assert product.apart
    groups = inner // (16 * work.mlp.per)
    assert groups % work.programs == 0
    lows = work.low_o, work.low_mlp, work.low_down, work.low_qkv
    assert lows[0].first == 0
    assert all(b.first - a.first == a.rows * a.pieces for a, b in itertools.pairwise(lows))


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 11008), (3072, 8192)])
def test_what_cannot_be_shared_out(hidden: int, inner: int) -> None:
    """An MLP that no number of programs divides into halves of whole tiles; rows that are no number of wide chunks."""
    assert work_of_layer(1, hidden, layers_of(hidden, inner, 1024), 132) is None


def test_what_it_does_not_take() -> None:
    layers, x = layers_of(4096, 14336, 1024), jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    assert "GPU" in str(obstacle(x, layers))
    assert "rows" in str(obstacle(jax.ShapeDtypeStruct((3, 4096), jnp.bfloat16), layers))
    assert "float32" in str(obstacle(jax.ShapeDtypeStruct((1, 4096), jnp.float32), layers))
    plain = dataclasses.replace(layers.weights[0][0], layout="flat", flat_shape=(4096, 4096))
    assert "layout 'rows'" in str(obstacle(x, layers._replace(weights=([plain], *layers.weights[1:]))))
    row = jnp.zeros(x.shape, x.dtype)
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU"):
        between_attentions(row, row, layers, jnp.int32(0), new_counts(4), implementation="triton")


@pytest.mark.parametrize("rank", [0, 16])
def test_by_the_ops_that_it_stands_for(rank: int) -> None:
    layers = random_layers(128, 64, 192, 64, rank, jnp.float32, copies=2)
    x, o = (jnp.asarray(np.random.default_rng(width).normal(size=(3, width)), jnp.float32) for width in (128, 64))
    for layer in range(2):
        y, qkv, counts = between_attentions(x, o, layers, jnp.int32(layer), new_counts(2))
        references = expected(x, o, layers, layer)
        for got, reference in zip((y, qkv), references[: 2 - layer], strict=False):
            assert np.linalg.norm(wide(got) - reference) < 1e-5 * np.linalg.norm(reference)
        assert not counts.any()
