"""On a GPU: packing gives the CPU's bits, and the fast paths agree with the references."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dequantize_nf4, flash_attention, linear_cross_entropy, nf4_matmul, quantize_nf4

pytestmark = pytest.mark.gpu
DTYPES = ["bfloat16", "float16", "float32"]


def weights(kind: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    if kind == "heavy tails":
        values = rng.standard_t(1.5, shape)
    elif kind == "denormals":
        values = values * 10.0 ** rng.uniform(-46, -36, (shape[0], 1))
    elif kind == "zero blocks":
        values[::3] = 0
    return np.clip(values, -6e4, 6e4).astype(jnp.dtype(dtype))


def on(device: Any, function: Any, *arguments: Any) -> list[np.ndarray]:
    with jax.default_device(device):
        result = jax.jit(function)(*jax.device_put(arguments, device))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


def bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "denormals", "zero blocks"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(256, 512), (96, 448), (33, 50)])
def test_packing_gives_the_cpus_bits(dtype: str, kind: str, double_quant: bool, shape: tuple[int, int]) -> None:
    gpu, cpu = jax.devices()[0], jax.devices("cpu")[0]
    weight = weights(kind, shape, dtype)

    def pack(w: jax.Array) -> Any:
        return quantize_nf4(w, double_quant=double_quant)

    with jax.default_device(cpu):
        packed = jax.jit(pack)(jax.device_put(weight, cpu))
    on_gpu, on_cpu = on(gpu, pack, weight), [np.asarray(leaf) for leaf in jax.tree.leaves(packed)]
    np.testing.assert_array_equal(on_gpu[0], on_cpu[0])  # codes
    if not double_quant:
        np.testing.assert_array_equal(bits(on_gpu[1]), bits(on_cpu[1]))
    else:  # the offset is a mean, and its last bit depends on the order of summation
        offsets = np.float32(on_gpu[-1]), np.float32(on_cpu[-1])
        assert abs(int(offsets[0].view(np.int32)) - int(offsets[1].view(np.int32))) <= 2
    for out in DTYPES:
        values = [on(device, lambda q, out=out: dequantize_nf4(q, jnp.dtype(out)), packed)[0] for device in (gpu, cpu)]
        np.testing.assert_array_equal(bits(values[0]), bits(values[1]))


def norm_ratio(ours: jax.Array, reference: jax.Array) -> float:
    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_agrees_with_its_reference(packed: bool, head_dim: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 512, 8, head_dim))
    k, v = (jax.random.normal(key, (2, 512, 2, head_dim)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    segments = jnp.repeat(jnp.array([[1, 2, 3, 0]], jnp.int32), 128, axis=1).repeat(2, axis=0) if packed else None

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None) -> jax.Array:
        out = flash_attention(q, k, v, segment_ids=segments, implementation=implementation)
        return (out.astype(jnp.float32) * weight).sum()

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    reference = differentiate(q, k, v, "xla")[1]
    ours = differentiate(*(x.astype(jnp.bfloat16) for x in (q, k, v)), "cudnn")[1]
    for mine, theirs in zip(ours, reference, strict=True):
        assert norm_ratio(mine, theirs) < 1e-2


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 2e-3), ("float32", 1e-5)])
def test_packed_matmul_and_loss(dtype: str, bound: float) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    packed = quantize_nf4(jax.random.normal(keys[0], (384, 256)))
    # logits of order 1: larger ones would magnify the rounding of what comes before the softmax
    x, head = 0.1 * jax.random.normal(keys[1], (77, 256)), 0.1 * jax.random.normal(keys[2], (1000, 384))
    labels = jax.random.randint(keys[3], (77,), 0, 1000)

    def loss(x: jax.Array, head: jax.Array, packed: Any) -> jax.Array:
        return linear_cross_entropy(nf4_matmul(x, packed), head, labels).sum()

    def exact(x: np.ndarray) -> np.ndarray:
        """The gradient in float64, on the host."""
        w = np.asarray(dequantize_nf4(packed, jnp.float32), np.float64)
        logits = x @ w.T @ np.asarray(head, np.float64).T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p[np.arange(77), np.asarray(labels)] -= 1
        return p @ np.asarray(head, np.float64) @ w

    gradient = jax.jit(jax.grad(loss))(x.astype(dtype), head.astype(dtype), packed)
    assert norm_ratio(gradient, exact(np.asarray(x, np.float64))) < bound
