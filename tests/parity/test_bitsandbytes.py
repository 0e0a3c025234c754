"""NF4 against bitsandbytes' CPU backend, bit for bit: codes, scales, values, and its serialised states in and out.

Two things about that backend. Its vectorised unpacking looks scales up as if every row began a new block, and so is
wrong for matrices with several rows whose width is a multiple of 16 but not of 64: such a matrix is compared as one
long row, which is the same data. And where the CPU has AVX512-BF16, its bfloat16 results below 2^-126 are zeros if the
width is a multiple of 16; ours are so on every machine.

Under double quantisation the offset is a mean, whose last bit depends, in large matrices, on how many threads sum. What
follows from it is then compared with what bitsandbytes makes of our offset.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjax.weights.bnb import nf4_from_bnb, nf4_to_bnb
from fastjax.weights.errors import (
    MissingTensorsError,
    NonFiniteWeightError,
    QuantizedCheckpointError,
    TensorShapeError,
)
from pallas_kernels.nf4 import NF4Array, dequantize_nf4, quantize_nf4
from pallas_kernels.nf4.codebook import NF4_LEVELS, dynamic_map, nf4_boundaries
from pallas_kernels.nf4.mean import float32_mean

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = list(TORCH)
NUMPY = {name: np.dtype(getattr(jnp, name)) for name in DTYPES}
State = bnb.QuantState


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles some of its fallbacks, for seconds each."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def assert_bits(actual: Any, expected: np.ndarray) -> None:
    actual = np.asarray(actual)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[expected.dtype.itemsize]
    np.testing.assert_array_equal(actual.view(unsigned), expected.view(unsigned))


def bnb_quantize(w: np.ndarray, double_quant: bool) -> tuple[torch.Tensor, State]:
    return bnb.quantize_4bit(to_torch(w), blocksize=64, quant_type="nf4", compress_statistics=double_quant)


def bnb_dequantize(packed: torch.Tensor, state: State, dtype: str) -> np.ndarray:
    rows, columns = shape = tuple(state.shape)
    state.dtype = TORCH[dtype]
    state.shape = torch.Size((1, rows * columns)) if columns % 16 == 0 and columns % 64 else state.shape
    w = to_numpy(bnb.dequantize_4bit(packed, state)).reshape(shape)
    state.shape = torch.Size(shape)
    if dtype == "bfloat16" and columns % 16 == 0:
        bits = w.view(np.uint16)
        w = np.where(bits & 0x7F80 == 0, bits & 0x8000, bits).astype(np.uint16).view(ml_dtypes.bfloat16)
    return w


def serialised(packed: torch.Tensor, state: State, name: str = "weight") -> dict[str, np.ndarray]:
    parts = {f"{name}.{key}": to_numpy(value) for key, value in state.as_dict(packed=True).items()}
    return {name: to_numpy(packed), **parts}


def check_against_bnb(w: np.ndarray, double_quant: bool) -> NF4Array:
    """Packs w both ways, compares everything, and the values unpacked to every dtype."""
    packed, state = bnb_quantize(w, double_quant)
    q = quantize_nf4(w, double_quant=double_quant)
    compare(q, packed, state, w.dtype)
    return q


def compare(q: NF4Array, packed: torch.Tensor, state: State, dtype: np.dtype) -> None:
    ours, theirs = nf4_to_bnb(q, dtype), serialised(packed, state)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_bits(ours[key], tensor)  # the offset among them, as JSON
    for name in DTYPES:
        assert_bits(dequantize_nf4(q, NUMPY[name]), bnb_dequantize(packed, state, name))


def normal(shape: tuple[int, int], scale: float = 0.02, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def heavy_tails(shape: tuple[int, int]) -> np.ndarray:
    return np.clip(np.random.default_rng(1).standard_t(0.8, shape), -1e4, 1e4)


def with_zero_blocks(shape: tuple[int, int]) -> np.ndarray:
    w = normal(shape).reshape(-1)
    w[64:192] = 0
    w[-30:] = 0
    return w.reshape(shape)


def test_tables():
    assert_bits(NF4_LEVELS, bnb.get_4bit_type("nf4", device="cpu").numpy())
    assert_bits(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 320), (2, 16448), (7, 66), (6, 33), (3, 10), (6, 48)])
def test_shapes(shape: tuple[int, int], dtype: str, double_quant: bool):
    check_against_bnb(normal(shape).astype(NUMPY[dtype]), double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(12, 128), (7, 66), (6, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_contents(dtype: str, shape: tuple[int, int], double_quant: bool):
    """Tails, zeros, and magnitudes from below the smallest denormal to the largest that a dtype has."""
    exponents = (-7, -3, 3) if dtype == "float16" else (-46, -45, -42, -39, -38, -37, -36, -30, 20, 35)
    contents = [heavy_tails(shape), with_zero_blocks(shape), np.zeros(shape), np.full(shape, 0.3)]
    contents += [normal(shape, 10.0**exponent) for exponent in exponents]
    mixed = normal(shape) * 10.0 ** np.random.default_rng(2).uniform(min(exponents), 2, (shape[0], 1))
    for w in [*contents, mixed]:
        check_against_bnb(w.astype(np.float32).astype(NUMPY[dtype]), double_quant)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_largest_weights(dtype: str):
    """Scales whose inverse is denormal; singly quantised, for the sum of many such overflows."""
    w = np.clip(normal((12, 128), 1e38), -3.3e38, 3.3e38).astype(np.float32).astype(NUMPY[dtype])
    check_against_bnb(w, False)


def test_every_bfloat16_ratio():
    """Every significand as a block's largest value, with every smaller value down to where all round to zero."""
    bits = np.arange(0x3B80, 0x4000, dtype=np.uint16)  # 2^-8 to 2
    values = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    blocks = []
    for largest in values[(values >= 1) & (values < 2)]:
        smaller = values[values <= largest]
        smaller = np.concatenate([smaller, -smaller])
        smaller = np.pad(smaller, (0, -smaller.size % 63)).reshape(-1, 63)
        blocks.append(np.insert(smaller, 0, largest, axis=1))
    w = np.concatenate(blocks).astype(ml_dtypes.bfloat16)
    packed, _ = bnb_quantize(w, False)
    assert_bits(nf4_to_bnb(quantize_nf4(w, double_quant=False), w.dtype)["weight"], to_numpy(packed))


@pytest.mark.parametrize("magnitude", [1.0, 1e-37, 1e-39, 1e37])
def test_values_at_the_boundaries(magnitude: float):
    """The float32 neighbours of every boundary times a scale, where the last bit of an inverse or product decides."""
    rng = np.random.default_rng(0)
    scales = (rng.uniform(1, 2, (2048, 1)) * magnitude).astype(np.float32)
    at = (scales.astype(np.float64) * nf4_boundaries()).astype(np.float32)  # [blocks, 15]
    steps = np.arange(-2, 2)
    near = (at.view(np.int32)[..., None] + steps.astype(np.int32)).view(np.float32).reshape(len(scales), -1)
    w = np.concatenate([scales, near, np.zeros((len(scales), 3), np.float32)], axis=1)
    for shape in [(2048, 64), (64, 2048)]:
        check_against_bnb(w.reshape(shape), False)
    # A last block that is partial is divided by its scale instead: 2048 matrices of one such block.
    partial = np.ascontiguousarray(w[:, None, :62])
    codes = np.asarray(quantize_nf4(partial, double_quant=False).codes)
    low_then_high = np.concatenate([codes & 15, codes >> 4], axis=1)
    packed = [to_numpy(bnb_quantize(matrix, False)[0])[:, 0] for matrix in partial]
    assert_bits(low_then_high[:, ::2] << 4 | low_then_high[:, 1::2], np.stack(packed))


def test_every_scale_code():
    """Scales that lie around their mean at all distances, and a last run of fewer than 256 of them."""
    rng = np.random.default_rng(0)
    distance = 0.9 * 10 ** -rng.uniform(0, 7, (325, 63)) * rng.choice([-1, 1], (325, 63))
    w = rng.uniform(-1, 1, (325, 63, 64))
    w[..., 5] = 1
    q = check_against_bnb((w * (1 + distance[..., None])).reshape(325, -1).astype(np.float32), True)
    assert len(np.unique(np.asarray(q.scales))) > 240


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 31, 33, 100, 511, 545, 1000, 4097, 9000, 20001, 32767])
def test_offsets_to_the_last_bit(size: int):
    """Rounded as torch rounds a mean of so many scales: every number of rests, levels and lanes."""
    rng = np.random.default_rng(size)
    scales = (np.exp(rng.standard_normal((5, size))) * 10.0 ** rng.uniform(-42, 0, (5, 1))).astype(np.float32)
    with jax.enable_x64(True):
        ours = [np.float32(jax.jit(float32_mean)(row.astype(np.float64))) for row in scales]
    theirs = [torch.from_numpy(row).mean().numpy() for row in scales]
    assert_bits(np.stack(ours), np.stack(theirs))


def test_the_offset_of_a_large_matrix():
    w = normal((1024, 2176)).astype(np.float32)
    q = quantize_nf4(w)
    packed, state = bnb_quantize(w, True)
    offset = np.asarray(q.offset)
    assert abs(offset - state.offset.numpy()) <= np.spacing(offset)
    state.offset = to_torch(offset.reshape(1))[0]
    absmax = bnb_quantize(w, False)[1].absmax
    state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=256)
    compare(q, packed, state, w.dtype)


def test_a_mean_whose_sum_overflows():
    """bitsandbytes' offset is then infinite and its values are NaN; ours are not."""
    w = np.clip(normal((64, 128), 1e38), -3.3e38, 3.3e38).astype(np.float32)
    _, state = bnb_quantize(w, True)
    assert torch.isinf(state.offset)
    q = quantize_nf4(w)
    single = quantize_nf4(w, double_quant=False)
    expected = np.asarray(single.scales, np.float64).mean()
    np.testing.assert_allclose(q.offset, expected, rtol=1e-6)
    restored = np.asarray(dequantize_nf4(q, np.float32), np.float64)
    assert np.abs(restored - np.asarray(dequantize_nf4(single, np.float32))).max() < 0.05 * 3.3e38


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
    exponent=st.floats(-44, 36),
    tail=st.floats(0, 3),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_anything(
    rows: int, columns: int, dtype: str, double_quant: bool, exponent: float, tail: float, zeros: float, seed: int
):
    columns += rows * columns % 2
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * np.exp(tail * rng.standard_normal((rows, columns)))
    w *= rng.uniform(size=w.shape) >= zeros
    w *= 10 ** np.clip(exponent, -8, 0) if dtype == "float16" else 10**exponent
    limit = float(jnp.finfo(dtype).max) / 1024  # sums of scales stay finite
    check_against_bnb(np.clip(w, -limit, limit).astype(np.float32).astype(NUMPY[dtype]), double_quant)


@pytest.mark.parametrize("shape", [(24, 128), (5, 1056), (300, 192), (2, 32768), (6, 33)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scale", [0.02, 1e-38])
def test_states_in_and_out(shape: tuple[int, int], double_quant: bool, scale: float):
    packed, state = bnb_quantize(normal(shape, scale).astype(np.float32), double_quant)
    tensors = serialised(packed, state)
    q = nf4_from_bnb(tensors)
    for dtype in DTYPES:
        assert_bits(dequantize_nf4(q, NUMPY[dtype]), bnb_dequantize(packed, state, dtype))
    again = nf4_to_bnb(q, np.float32)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_bits(again[key], tensor)


def test_a_state_with_its_own_nested_map():
    """Maps differ in last bits between machines; a state is unpacked with its own."""
    packed, state = bnb_quantize(normal((64, 256)).astype(np.float32), True)
    nudged = np.nextafter(dynamic_map(), np.float32(2))
    for entries in (nudged, np.linspace(-1, 1, 256, dtype=np.float32)):
        state.state2.code = to_torch(entries)
        q = nf4_from_bnb(serialised(packed, state))
        assert_bits(dequantize_nf4(q, np.float32), bnb_dequantize(packed, state, "float32"))
        assert_bits(nf4_to_bnb(q, np.float32)["weight.nested_quant_map"], entries)
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), q, q)
        assert_bits(dequantize_nf4(stack, np.float32)[1], bnb_dequantize(packed, state, "float32"))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_of_bitsandbytes(storage: torch.dtype):
    """A saved Linear4bit comes in, and what goes out loads as one."""
    w = normal((96, 128)).astype(np.float32)
    layer = Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
    layer.weight = Params4bit(to_torch(w), requires_grad=False, quant_type="nf4", quant_storage=storage)
    layer = layer.to("cpu")
    tensors = {f"layer.{key}": to_numpy(value) for key, value in layer.state_dict().items()}
    q = nf4_from_bnb(tensors, "layer.weight")
    expected = to_numpy(bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert_bits(dequantize_nf4(q, np.float32), expected)

    exported = {key: torch.from_numpy(value) for key, value in nf4_to_bnb(q, np.float32, "layer.weight").items()}
    stats = {key.removeprefix("layer.weight."): value for key, value in exported.items() if key != "layer.weight"}
    again = Params4bit.from_prequantized(exported["layer.weight"], stats, device="cpu")
    assert_bits(to_numpy(bnb.dequantize_4bit(again.data, again.quant_state)), expected)


def test_jax_arrays_and_our_own_states():
    q = quantize_nf4(normal((8, 128)).astype(np.float32))
    tensors = {key: jnp.asarray(value) for key, value in nf4_to_bnb(q, jnp.bfloat16, "a.weight").items()}
    again = nf4_from_bnb(tensors, "a.weight")
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(assert_bits, again, jax.tree.map(np.asarray, q))
    assert json.loads(bytes(np.asarray(tensors["a.weight.quant_state.bitsandbytes__nf4"])))["dtype"] == "bfloat16"


def edit_state(**changes: Any) -> dict[str, np.ndarray]:
    tensors = serialised(*bnb_quantize(normal((8, 128)).astype(np.float32), True))
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].tobytes()) | changes
    return tensors | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def edit(**tensors: np.ndarray | None) -> dict[str, np.ndarray]:
    changed = edit_state() | {key.replace("__", "."): value for key, value in tensors.items()}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "error", "named"),
    [
        (edit(weight=None), MissingTensorsError, "lacks weight,"),
        (edit(weight__absmax=None), MissingTensorsError, "lacks weight.absmax,"),
        (edit(weight__nested_quant_map=None), MissingTensorsError, "lacks weight.nested_quant_map,"),
        (edit(weight=np.zeros(9, np.uint8)), TensorShapeError, "weight has 9 values, not 512"),
        (edit(weight__absmax=np.zeros(15, np.uint8)), TensorShapeError, "weight.absmax has 15 values, not 16"),
        (edit(weight__nested_absmax=np.float32([np.nan])), NonFiniteWeightError, "weight.nested_absmax holds NaN"),
        (edit(weight__nested_absmax=np.zeros(1)), QuantizedCheckpointError, "weight.nested_absmax has dtype float64"),
        (
            edit(weight__quant_map=np.linspace(-1, 1, 16, dtype=np.float32)),
            QuantizedCheckpointError,
            "weight.quant_map",
        ),
        (edit_state(blocksize=128), QuantizedCheckpointError, "blocks of 128"),
        (edit_state(quant_type="fp4"), QuantizedCheckpointError, "fp4"),
        (edit_state(nested_blocksize=4096), QuantizedCheckpointError, "nested blocks of 4096"),
        (edit_state(nested_offset=float("inf")), NonFiniteWeightError, "quant_state"),
        (edit_state(shape=[1024]), QuantizedCheckpointError, "not the JSON"),
        (edit_state(shape=None), QuantizedCheckpointError, "not the JSON"),
        (edit_state(shape=[3, 5]), QuantizedCheckpointError, "even number"),
    ],
)
def test_bad_states(tensors: dict[str, np.ndarray], error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        nf4_from_bnb(tensors)


def test_other_formats():
    w = to_torch(normal((8, 128)).astype(np.float32))
    fp4 = serialised(*bnb.quantize_4bit(w, blocksize=64, quant_type="fp4"))
    with pytest.raises(QuantizedCheckpointError, match="not NF4"):
        nf4_from_bnb(fp4)
    damaged = edit(weight__quant_state__bitsandbytes__nf4=None)
    damaged["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(b"{not json", np.uint8)
    with pytest.raises(QuantizedCheckpointError, match="not the JSON"):
        nf4_from_bnb(damaged)


def test_what_cannot_be_exported():
    q = quantize_nf4(normal((8, 128)).astype(np.float32))
    with pytest.raises(ValueError, match="one matrix"):
        nf4_to_bnb(jax.tree.map(lambda leaf: leaf[None], q), np.float32)
    with pytest.raises(ValueError, match="int8"):
        nf4_to_bnb(q, np.int8)
    with pytest.raises(ValueError, match="codes"):
        nf4_to_bnb(dataclasses.replace(q, codes=q.codes[:, :-1]), np.float32)
