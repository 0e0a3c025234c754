"""Products with a few rows against unpacking first and against a bfloat16 weight; bytes are the packed weight's.

Eight weights take turns, 240 MB of them, so that none is found in the cache. A decoder layer's groups of linears, with LoRA
of rank 16 and a residual where there is one, are measured as one launch (`linears`) and weight by weight; the layers of a
stack take turns there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.dequantize_nf4 import row
from bench.kernels.timing import device_time
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, linears, nf4_matvec, quantize_nf4

OP = "nf4_matvec"
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
ROWS = (1, 4, 16)
WEIGHTS = 8
GROUPS = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))  # of an 8B's layer
GROUP_ROWS = (1, 8, 16, 64)
RANK = 16


def rows() -> list[dict[str, Any]]:
    results = []
    for out, width in SHAPES:
        keys = jax.random.split(jax.random.key(0), WEIGHTS)
        qs = [quantize_nf4(jax.random.normal(key, (out, width), jnp.bfloat16)) for key in keys]
        dense = [dequantize_nf4(q) for q in qs[:2]]
        for count in ROWS:
            x = jax.random.normal(jax.random.key(1), (count, width), jnp.bfloat16)
            case, moved = f"{count} x {out}x{width}", qs[0].nbytes
            for name in ("triton", "xla"):
                seconds = device_time(
                    lambda x, q: nf4_matvec(x, q, implementation=name),  # noqa: B023
                    *(x, qs[0]),
                    more=[(x, q) for q in qs[1:]],
                )
                results.append(row(OP, case, name, seconds, moved))
            seconds = device_time(_product, x, dense[0], more=[(x, dense[1])])
            results.append(row(OP, case, "bfloat16 weight", seconds, moved))
    return results + [each for group in GROUPS for count in GROUP_ROWS for each in group_rows(group, count)]


def group_rows(group: tuple[tuple[int, ...], int], rows: int) -> list[dict[str, Any]]:
    """A group of weights of one input [rows, in], by both implementations of `linears`."""
    heights, width = group
    stacks = [_packed(WEIGHTS, height, width) for height in heights]
    x = jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)
    z = jax.random.normal(jax.random.key(2), (rows, len(heights) * RANK), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(3), (WEIGHTS, sum(heights), RANK), jnp.bfloat16)
    residual = jax.random.normal(jax.random.key(4), (rows, width), jnp.bfloat16) if len(heights) == 1 else None
    if residual is not None:
        residual = residual[:, : heights[0]]
    case, moved = f"{rows} x {'+'.join(map(str, heights))}x{width}", sum(stack.nbytes for stack in stacks) // WEIGHTS
    results = []
    for name in ("triton", "separate"):

        def run(
            x: jax.Array, stacks: list, z: jax.Array, b: jax.Array, layer: jax.Array, name: str = name
        ) -> jax.Array:
            slices = [NF4Slice(stack, layer) for stack in stacks]
            return linears(x, slices, z=z, b=b, layer=layer, residual=residual, implementation=name)

        seconds = device_time(
            run, x, stacks, z, b, jnp.int32(0), more=[(x, stacks, z, b, jnp.int32(i)) for i in range(1, WEIGHTS)]
        )
        results.append(row("linears", case, name, seconds, moved))
    return results


def _packed(layers: int, height: int, width: int) -> NF4Array:
    """Random codes: what normal weights pack to."""
    one = quantize_nf4(jax.random.normal(jax.random.key(height), (height, width), jnp.bfloat16))
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), one)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
