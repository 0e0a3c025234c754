"""What NF4 stands for, once more in plain numpy, which rounds every float32 operation and keeps denormals."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.nf4 import NF4Array
from pallas_kernels.nf4.codebook import NF4_LEVELS, dynamic_map

Reference = Callable[..., np.ndarray]


def block_scales(q: NF4Array) -> np.ndarray:
    """float32 scale of every block of a matrix, in block order."""
    scales = np.asarray(q.scales)
    if q.nested_scales is None:
        return scales.reshape(-1)
    nested = np.asarray(q.nested_scales)
    spread = np.empty(scales.shape, np.float32)
    for index in np.ndindex(*scales.shape):
        cell = q.nested_cell or (256,)
        at = tuple(i // c if n > 1 else 0 for i, c, n in zip(index, cell, nested.shape, strict=True))
        spread[index] = nested[at]
    entries = dynamic_map() if q.nested_map is None else np.array(q.nested_map, np.float32)
    return (entries[scales] * spread + np.asarray(q.offset)).reshape(-1)


def unpack(q: NF4Array, dtype: type | np.dtype = np.float32) -> np.ndarray:
    """The matrix that q stands for, value by value."""
    size = q.shape[0] * q.shape[1]
    values = np.empty(size, np.float32)
    codes = np.asarray(q.codes).reshape(-1)
    for block, scale in enumerate(block_scales(q)):
        first, count = 64 * block, min(64, size - 64 * block)
        packed = codes[first // 2 : (first + count) // 2]
        values[first : first + count] = NF4_LEVELS[np.concatenate([packed & 15, packed >> 4])] * scale
    if dtype == ml_dtypes.bfloat16 and q.shape[1] % 16 == 0:
        values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)
    with np.errstate(over="ignore"):
        return values.astype(dtype).reshape(q.shape)


@pytest.fixture
def reference() -> Reference:
    """reference(q, dtype) -> the matrix as numpy computes it."""
    return unpack
