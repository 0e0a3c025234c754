"""What an op says on a machine that has no kernels for it, and that it runs there all the same."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    decode_attention,
    dequantize_nf4,
    flash_attention,
    linear_cross_entropy,
    nf4_matmul,
    nf4_matvec,
    quantize_nf4,
    rms_norm,
    triton_call,
)
from pallas_kernels.low_rank import contract_rows, low_rank_gradients, project_into
from pallas_kernels.nf4 import NF4Slice, unpack_slices
from pallas_kernels.rope import rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

BF16 = jnp.bfloat16
Q = jax.eval_shape(quantize_nf4, jax.ShapeDtypeStruct((2, 8, 64), BF16))
ONE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), Q)


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


HEADS = [shape(1, 8, 2, 64)] * 3
ANGLES = [shape(1, 8, 32, dtype=jnp.float32)] * 2
OPS = {  # what takes implementation="triton", and arguments
    "quantize_nf4": (quantize_nf4, [shape(8, 64)]),
    "dequantize_nf4": (dequantize_nf4, [Q]),
    "unpack_slices": (
        lambda q, i, **kw: unpack_slices([NF4Slice(q, i)], BF16, after=i, **kw),
        [Q, shape(dtype=jnp.int32)],
    ),
    "nf4_matmul": (nf4_matmul, [shape(3, 64), ONE]),
    "nf4_matvec": (nf4_matvec, [shape(3, 64), ONE]),
    "flash_attention": (flash_attention, HEADS),
    "decode_attention": (decode_attention, [shape(1, 1, 2, 64), *[shape(1, 2, 8, 64)] * 2, shape(1, dtype=jnp.int32)]),
    "linear_cross_entropy": (linear_cross_entropy, [shape(3, 64), shape(9, 64), shape(3, dtype=jnp.int32)]),
    "rms_norm": (lambda x, w, **kw: rms_norm(x, w, 1e-5, **kw), [shape(3, 64), shape(64)]),
    "rope_qkv": (lambda x, *angles, **kw: rope_qkv(x, *angles, 2, 2, **kw), [shape(8, 384), *ANGLES]),
    "rope_qkv_backward": (rope_qkv_backward, [*HEADS, *ANGLES]),
    "swiglu_forward": (swiglu_forward, [shape(3, 128)]),
    "swiglu_backward": (swiglu_backward, [shape(3, 128), shape(3, 64)]),
    "project_into": (project_into, [shape(3, 128), shape(64, 8), shape(8, dtype=jnp.float32)]),
    "contract_rows": (lambda x, y, **kw: contract_rows(x, y, rank=8, **kw), [shape(3, 64), shape(3, 64)]),
    "low_rank_gradients": (
        lambda *arrays, **kw: low_rank_gradients(*arrays, (8,), (64,), **kw),
        [shape(3, 8), shape(3, 128), shape(8, 64), shape(8, dtype=jnp.float32)],
    ),
}


@pytest.fixture(params=[None, (7, 5), (9, 0)], ids=["no GPU", "Turing", "without jax-triton"])
def reason(request, monkeypatch):
    """A machine, and why Triton kernels do not run there."""
    for module in ("cudnn", "mosaic_common", "triton"):
        name = f"pallas_kernels.flash_attention.{module}"
        monkeypatch.setattr(importlib.import_module(name), "cuda_capability", lambda: (7, 5))
    monkeypatch.setattr(triton_call, "cuda_capability", lambda: request.param)
    monkeypatch.setattr(triton_call, "_installed", lambda: False)
    monkeypatch.setattr(triton_call, "_warn_not_installed", lambda: None)
    reasons = {None: "needs an NVIDIA GPU, and jax runs on another device", (7, 5): "8.0 or later .Ampere., not 7.5"}
    return reasons.get(request.param, "needs jax-triton .pip install")


@pytest.mark.parametrize("name", OPS)
def test_refused_or_run_by_xla(name, reason):
    function, arguments = OPS[name]
    with pytest.raises(ValueError, match=f"cannot run with implementation='triton': it .*{reason}.*use .*xla"):
        jax.eval_shape(partial(function, implementation="triton"), *arguments)
    chosen, by_xla = (jax.make_jaxpr(partial(function, **kw))(*arguments) for kw in ({}, {"implementation": "xla"}))
    assert chosen.out_avals == by_xla.out_avals
    assert "triton" not in str(chosen)
    with pytest.raises(ValueError, match=r"has no implementation='cuda'; use one of .*xla"):
        jax.eval_shape(partial(function, implementation="cuda"), *arguments)


@pytest.mark.parametrize(
    ("implementation", "needs"), [("mosaic", "Hopper GPU"), ("cudnn", "compute capability 8.0 or more")]
)
def test_attention_for_later_gpus(implementation, needs, reason):
    with pytest.raises(ValueError, match=f"implementation='{implementation}': it needs an? .*{needs}.*use .*xla"):
        jax.eval_shape(partial(flash_attention, implementation=implementation), *HEADS)
