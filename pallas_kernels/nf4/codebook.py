"""The tables NF4 is made of: sixteen weight levels, and the 256-entry map that block scales are compressed with.

NF4 levels. Quantiles of a standard normal distribution, scaled to [-1, 1], with an exact zero. They are the definition
of the format, hence written down, as float32 values.

Dynamic map. An 8-bit code for numbers in [-1, 1] that spends its bits where small scales live: decade i (i = 0..6,
from 1e-6 up to 1) holds 2^i values of each sign, the centres of 2^i equal parts of [0.1, 1] times 10^(i-6). Zero and
one complete the 256. It is built here in the float32 steps that the format's reference takes, each spacing one fused
multiply-add, since the last bit of an entry decides whether scales are bit-identical.

Scale codes. The reference does not search the map for the nearest entry but buckets a normalised scale x into 65536
equal cells of [-1, 1] and looks the code up there; `nested_code_table` is that table. A cell's code is the number of
midpoints between neighbouring entries that lie below the cell's value.
"""

import functools

import numpy as np

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a nested scale
NESTED_CELLS = 65536

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@functools.cache
def nf4_boundaries() -> np.ndarray:
    """float32 [15]: a normalised weight's code is the number of these strictly below it."""
    return (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2)


@functools.cache
def dynamic_map(*, signed: bool = True) -> np.ndarray:
    """float32 [256], ascending: what an 8-bit code stands for, scales' by default. Unsigned, decades hold twice as many."""
    decades = [np.float32(10.0 ** (i - 6)) * _centres(2**i if signed else 2 ** (i + 1)) for i in range(7)]
    values = [*decades, *(-part for part in decades if signed), np.zeros(1, np.float32), np.ones(1, np.float32)]
    return np.sort(np.concatenate(values))


def _centres(parts: int) -> np.ndarray:
    """float32 centres of `parts` equal parts of [0.1, 1]; edges are spaced from the nearer end."""
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64((high - low) / np.float32(parts))
    k = np.arange(parts + 1)
    # A float32 product is exact in float64, so rounding the sum once is what a fused multiply-add does.
    up, down = np.float32(low + step * k), np.float32(high - step * (parts - k))
    edges = np.where(k < (parts + 1) // 2, up, down)
    return (edges[:-1] + edges[1:]) / np.float32(2)


@functools.cache
def nested_code_table() -> np.ndarray:
    """uint8 [65536]: the scale code of each cell of [-1, 1]."""
    levels = dynamic_map()
    midpoints = (levels[:-1] + levels[1:]) * np.float32(0.5)
    cell = np.arange(NESTED_CELLS, dtype=np.float32)
    values = (cell + cell) / np.float32(NESTED_CELLS - 1) - np.float32(1)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)
