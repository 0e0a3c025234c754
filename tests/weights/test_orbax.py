"""Packed weights go through an Orbax checkpoint as any other pytree."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 128), (33, 50)])
def test_packed_weights_are_restored(double_quant: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = jax.random.normal(jax.random.key(0), shape)
    packed = quantize_nf4(weight, double_quant=double_quant)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"weight": packed})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", jax.eval_shape(lambda: {"weight": packed}))["weight"]
    assert isinstance(restored, NF4Array)
    assert jax.tree.structure(restored) == jax.tree.structure(packed)
    np.testing.assert_array_equal(dequantize_nf4(restored, jnp.float32), dequantize_nf4(packed, jnp.float32))
