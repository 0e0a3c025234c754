"""A GPU packs and unpacks to the bits that the CPU does, denormals and extremes included."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.low_rank import norm_and_project, project, summands, swiglu_and_project
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, linears, nf4_matvec, quantize_nf4
from pallas_kernels.nf4.codebook import NF4_LEVELS

pytestmark = pytest.mark.gpu
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def on(platform: str, tree: NF4Array | np.ndarray) -> NF4Array | jax.Array:
    return jax.device_put(tree, jax.local_devices(backend=platform)[0])


def quantized_on(platform: str, w: np.ndarray, **options: bool) -> NF4Array:
    """Packed by that platform; kernels are chosen for the default device, which it has to be."""
    with jax.default_device(jax.local_devices(backend=platform)[0]):
        return quantize_nf4(jnp.asarray(w), **options)


def dequantized_on_cpu(q: NF4Array, dtype: jnp.dtype = jnp.bfloat16) -> np.ndarray:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(dequantize_nf4(on("cpu", q), dtype))


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
        gpu, cpu = (quantized_on(platform, w, double_quant=double_quant) for platform in ("gpu", "cpu"))
        jax.tree.map(assert_same_bits, gpu, cpu)
        for out in DTYPES:
            expected = dequantized_on_cpu(cpu, out)
            assert_same_bits(dequantize_nf4(gpu, out), expected)
            widened = jax.jit(lambda q: dequantize_nf4(q, out).astype(jnp.float32))(gpu)  # noqa: B023
            assert_same_bits(widened, expected.astype(np.float32))


def random_codes(shape: tuple[int, ...], double_quant: bool = True, seed: int = 0) -> NF4Array:
    """Random codes and scales."""
    rng = np.random.default_rng(seed)
    q = jax.eval_shape(lambda w: quantize_nf4(w, double_quant=double_quant), jax.ShapeDtypeStruct(shape, jnp.float32))

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == jnp.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)

    return jax.tree.map(fill, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (300, 64), (1, 32768), (7, 4160), (3, 2, 9, 320), (1025, 1024)])
def test_kernel_unpacks_the_same_bits(shape: tuple[int, ...], double_quant: bool, dtype: jnp.dtype):
    q = random_codes(shape, double_quant)
    expected = dequantize_nf4(on("cpu", q), dtype, implementation="xla")
    assert_same_bits(dequantize_nf4(on("gpu", q), dtype, implementation="triton"), expected)
    assert_same_bits(dequantize_nf4(on("gpu", q), dtype, implementation="xla"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_around_the_smallest_normal_number(dtype: jnp.dtype):
    """Scales whose product with some level is 2^-126, an ulp more or less, or rounds up to it; for float16 2^-14."""
    smallest = 2.0**-14 if dtype == jnp.float16 else 2.0**-126
    centre = (smallest / np.abs(NF4_LEVELS[NF4_LEVELS != 0]).astype(np.float64)).astype(np.float32)
    bits = centre.view(np.int32)[:, None] + np.arange(-16, 17, dtype=np.int32)
    scales = np.concatenate([bits.reshape(-1).view(np.float32), np.full(1, 2.0**-149, np.float32)])
    scales = np.resize(scales, (31, 16))
    q = dataclasses.replace(random_codes((31, 1024), double_quant=False), scales=scales)
    q = dataclasses.replace(q, codes=np.resize(np.arange(256, dtype=np.uint8), q.codes.shape))
    expected = dequantize_nf4(on("cpu", q), dtype, implementation="xla")
    assert_same_bits(dequantize_nf4(on("gpu", q), dtype, implementation="triton"), expected)


def test_own_nested_map_on_gpu():
    q = dataclasses.replace(
        random_codes((16, 128)), nested_map=tuple(np.linspace(-1, 1, 256, dtype=np.float32).tolist())
    )
    assert_same_bits(dequantize_nf4(on("gpu", q)), dequantized_on_cpu(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 4160), (2, 9, 320), (1025, 1024)])
def test_kernel_packs_the_same_bits(shape: tuple[int, ...], dtype: jnp.dtype):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32).astype(dtype)
    for double_quant in (True, False):
        expected = quantized_on("cpu", w, double_quant=double_quant)
        got = quantize_nf4(on("gpu", w), double_quant=double_quant, implementation="triton")
        jax.tree.map(assert_same_bits, got, expected)


BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("shape", "double_quant"), [((5, 64), True), ((100, 4160), True), ((513, 1152), False)])
def test_matvec(shape: tuple[int, int], double_quant: bool, rows: int, dtype: jnp.dtype):
    q = on(
        "gpu",
        quantize_nf4(np.random.default_rng(0).standard_normal((2, *shape), np.float32), double_quant=double_quant),
    )
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)
    x = jax.random.normal(jax.random.key(1), (rows, shape[1]), dtype)
    for layer in (0, 1):
        y = jax.jit(lambda x, i: nf4_matvec(x, NF4Slice(q, i), implementation="triton"))(x, jnp.int32(layer))
        expected = np.asarray(x, np.float64) @ w[layer].T
        assert y.dtype == dtype
        assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)
    one = jax.tree.map(lambda leaf: leaf[1], q)
    y, pullback = jax.vjp(lambda x: nf4_matvec(x, one, implementation="triton"), x)
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)
    (dx,) = pullback(y)
    expected = np.asarray(y, np.float64) @ w[1]
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 40])
@pytest.mark.parametrize(
    ("heights", "width", "rank", "double_quant"),
    [
        ((4096, 1024, 1024), 4096, 16, True),
        ((14336, 14336), 4096, 16, True),
        ((4096,), 14336, 128, True),
        ((4095, 17), 320, 0, True),
        ((100, 7, 513), 1152, 48, False),
        ((100, 2064, 513), 8192, 32, True),  # codes in bulk on Hopper, two stages a tile, and more tiles than a ring
    ],
)
def test_linears(heights, width, rank, double_quant, rows, dtype) -> None:
    """Several weights of a stack's second layer in one launch, LoRA and residual with them, against float64."""
    layer = jnp.int32(1)
    stacks = [on("gpu", random_codes((2, height, width), double_quant, seed=height)) for height in heights]
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, width), dtype)
    residual = jax.random.normal(keys[1], (rows, sum(heights)), dtype)
    z = jax.random.normal(keys[2], (rows, len(heights) * rank), dtype) if rank else None
    b = jax.random.normal(keys[3], (2, sum(heights), rank), dtype) if rank else None

    @jax.jit
    def run(x, stacks, layer, z, b, residual):
        slices = [NF4Slice(stack, layer) for stack in stacks]
        return linears(x, slices, z=z, b=b, layer=layer, residual=residual, implementation="triton")

    for again in range(2):  # a second time with the table and the sums of the first in shared memory
        y = np.asarray(run(x, stacks, layer, z, b, residual), np.float64)
        end = 0
        for i, (stack, height) in enumerate(zip(stacks, heights, strict=True)):
            columns = slice(end, end + height)
            w = np.asarray(dequantize_nf4(stack, jnp.float32)[1])
            expected = np.asarray(x, np.float32) @ w.T + np.asarray(residual, np.float32)[:, columns]
            if z is not None and b is not None:
                own = np.asarray(z, np.float32)[:, i * rank : (i + 1) * rank]
                expected = expected + own @ np.asarray(b, np.float32)[1, columns].T
            error = np.linalg.norm(y[:, columns] - expected) / np.linalg.norm(expected)
            assert error <= BOUNDS[dtype], (again, i, error)
            end += height


@pytest.mark.parametrize(("rows", "room"), [(1, 0), (16, 0), (64, 0), (17, 64), (128, 64)])
@pytest.mark.parametrize(("width", "count"), [(4096, 48), (14336, 16), (100, 3), (4096, 0)])
def test_inputs_with_their_low_rank_products(width, count, rows, room) -> None:
    if not count and (room or rows > 16):
        pytest.skip("a norm alone is not these kernels'")
    layer = jnp.int32(1)
    keys = jax.random.split(jax.random.key(0), 4)
    a = jax.random.normal(keys[0], (2, count, width), jnp.bfloat16) if count else None
    x = jax.random.normal(keys[1], (rows, width), jnp.bfloat16)
    weight = jax.random.normal(keys[2], (2, width), jnp.bfloat16)
    gate_up = jax.random.normal(keys[3], (rows, 2 * width), jnp.bfloat16)
    for function, inputs in (
        (norm_and_project, (x, weight, 1e-5, a, layer)),
        (swiglu_and_project, (gate_up, a, layer)),
        (project, (x, a, layer)),
        (partial(swiglu_and_project, parts=4), (gate_up, a, layer)),
        (partial(project, parts=4), (x, a, layer)),
    ):
        results = [function(*inputs, room=room, implementation=name) for name in ("triton", "xla")]
        if room:
            parts = summands(room, count)
            each = [u[:, width : width + parts * count].reshape(rows, parts, count) for u, _ in results]
            assert not any(u[:, width + parts * count :].any() for u, _ in results)
            results = [(u[:, :width], z.sum(axis=1)) for (u, _), z in zip(results, each, strict=True)]
        elif count:
            results = [(u, z.reshape(rows, -1, count).sum(axis=1)) for u, z in results]
        (got, got_z), (expected, z) = results
        for mine, theirs in ((got, expected), (got_z, z)) if z is not None else ((got, expected),):
            mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
            assert np.linalg.norm(mine - theirs) <= 1e-2 * np.linalg.norm(theirs)
