"""The door to jax-triton, which is replaced here: no kernel runs."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.triton_call import triton_call

jax_triton = pytest.importorskip("jax_triton")


@pytest.mark.parametrize("checked", [True, False])
def test_results_differ_where_arguments_do(monkeypatch, checked):
    """A kernel's results inside a shard_map can be summed over its axis like any others."""

    def nothing(*arrays, out_shape, **rest):
        return [jnp.ones(each.shape, each.dtype) for each in out_shape]

    monkeypatch.setattr(jax_triton, "triton_call", nothing)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def summed(x):
        (y,) = triton_call(None, x, out=[jax.ShapeDtypeStruct((2,), jnp.float32)], grid=(1,))
        if checked:
            assert jax.typeof(y).mat.varying == {"data"}
        return jax.lax.psum(y, "data")

    whole = jax.sharding.PartitionSpec()
    run = jax.shard_map(summed, mesh=mesh, in_specs=rows, out_specs=whole, check_vma=checked)
    assert jax.jit(run)(jnp.ones(8)).tolist() == [4.0, 4.0]
