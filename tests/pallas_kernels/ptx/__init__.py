"""A multiprocessor in numpy that runs a kernel's PTX, so that what a kernel says in PTX of its own is tested without a GPU.

A warp is 32 lanes that run together; lanes of a warp that part at a branch go on from the lowest statement and meet again.
Warps are run in turns of any length, in an order drawn anew, and a bulk copy arrives some time after it was asked for: what a
program forgets to wait for comes out wrong, or as an error. So does an access that is outside an array or shared memory,
or not aligned. What memory holds before it is written is no number (all bits set).

Only what our kernels' PTX uses is there.
"""

from collections.abc import Sequence

import numpy as np

from tests.pallas_kernels.ptx.code import Code
from tests.pallas_kernels.ptx.machine import Fault, Program
from tests.pallas_kernels.ptx.operations import OPERATIONS

__all__ = ["Fault", "launch"]


def launch(ptx: str, arrays: Sequence[np.ndarray], grid: Sequence[int], seed: int = 0) -> None:
    """Run a kernel over a grid; `arrays` are its arguments, written in place."""
    code, chance = Code(ptx), np.random.default_rng(seed)
    flat = [each.reshape(-1).view(np.uint8) for each in arrays]
    x, y, z = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for index in np.ndindex(z, y, x):
            Program(code, OPERATIONS, flat, index[::-1], chance).run()
