"""Matrices of a stack, unpacked for a matrix product: several at once, without cutting them out first."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.nf4.array import NF4Slice
from pallas_kernels.nf4.dequantize import dequantize_nf4
from pallas_kernels.nf4.unpack import unpack, unpack_obstacle
from pallas_kernels.ordering import zero_after


def unpack_slices(
    slices: Sequence[NF4Slice],
    dtype: Any,
    *,
    after: jax.Array,
    rows: int = 0,
    columns: int = 0,
    implementation: str | None = None,
) -> Float[Array, "out+rows in+columns"]:
    """Matrices of one width and one index, one below the other, and past them rows and columns for the caller to fill.

    Not before `after` is there (see ordering): several layers' weights would else be in memory together.
    """
    index, zero = slices[0].index, zero_after(after)
    stacks = [slice_.stack for slice_ in slices]
    obstacle = next(filter(None, map(unpack_obstacle, stacks)), None)
    if choose_implementation("unpack_slices", implementation, {"triton": obstacle, "xla": None}) == "triton":
        return unpack(stacks, (index + zero)[None], dtype, rows=rows, columns=columns)[0]
    # of a stack of one, a compiler knows the index whatever is added to it
    cut = [NF4Slice(stack, index).cut() for stack in stacks]
    late = [dataclasses.replace(q, codes=q.codes ^ zero.astype(jnp.uint8)) for q in cut]
    whole = [dequantize_nf4(q, dtype, implementation="xla") for q in late]
    return jnp.pad(jnp.concatenate(whole, axis=0), ((0, rows), (0, columns)))
