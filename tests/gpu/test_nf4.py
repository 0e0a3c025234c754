"""A GPU packs and unpacks to the bits that the CPU does, denormals and extremes included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4 import NF4Array, dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.gpu
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def on(platform: str, tree: NF4Array | np.ndarray) -> NF4Array | jax.Array:
    return jax.device_put(tree, jax.local_devices(backend=platform)[0])


def assert_same_bits(a: jax.Array, b: jax.Array | np.ndarray) -> None:
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(a).view(unsigned), np.asarray(b).view(unsigned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 512), (33, 130)])
def test_same_bits(shape: tuple[int, int], double_quant: bool, dtype: jnp.dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))
    for magnitude in (1.0, 1e-6) if dtype == jnp.float16 else (1.0, 1e-6, 1e-37, 1e-39, 1e-44, 1e36):
        w = (values * magnitude).astype(np.float32).astype(dtype)
        gpu, cpu = (quantize_nf4(on(platform, w), double_quant=double_quant) for platform in ("gpu", "cpu"))
        jax.tree.map(assert_same_bits, gpu, cpu)
        for out in DTYPES:
            expected = dequantize_nf4(cpu, out)
            assert_same_bits(dequantize_nf4(gpu, out), expected)
            widened = jax.jit(lambda q: dequantize_nf4(q, out).astype(jnp.float32))(gpu)  # noqa: B023
            assert_same_bits(widened, np.asarray(expected).astype(np.float32))
