"""Timing of kernels that memory bounds: GB/s of the bytes they must move, beside a copy measured in the same run.

Before it is timed, an implementation has to agree with the plain-jnp one in float32 on the same values.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._check import agree, verified

COPIES = 4  # of the arguments, used in turn: together they are larger than any cache
ROUNDS = 9


def _in_turns(cases: dict[str, tuple[Callable, Callable]]) -> dict[str, float]:
    """Median time of one call. One program calls it on every copy of the arguments, so that no launch leaves a gap."""
    programs = {}
    for name, (function, make) in cases.items():
        arguments = [tuple(make(seed)) for seed in range(COPIES)]
        program = jax.jit(lambda sets, function=function: [function(*each) for each in sets])
        programs[name] = functools.partial(program.lower(arguments).compile(), arguments)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS + 2):
        for name, program in programs.items():
            jax.block_until_ready(program())
            start = time.perf_counter()
            results = [program() for _ in range(4)]
            jax.block_until_ready(results)
            times[name].append((time.perf_counter() - start) / (4 * COPIES))
            del results
    return {name: statistics.median(each[2:]) for name, each in times.items()}


@functools.cache
def copy_bandwidth() -> float:
    """GB/s of the faster of two ways to copy 512 MiB, reading and writing counted."""

    def make(seed: int) -> list[jax.Array]:
        return [jax.random.normal(jax.random.key(seed), (256 * 2**20,), jnp.bfloat16)]

    taken = _in_turns({"copy": (jnp.copy, make), "negate": (jnp.negative, make)})
    return 2 * 512 * 2**20 * 1e-9 / min(taken.values())


def compare(
    op: str, case: str, moved: int, make: Callable[[int], Sequence[jax.Array]], implementations: dict[str, Callable]
) -> list[dict[str, Any]]:
    """A row per implementation. `moved`: bytes that any implementation has to read and write."""
    arrays = tuple(make(0))
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    expected = jax.jit(implementations["xla"])(*wide)
    calls = {name: functools.partial(jax.jit(function), *arrays) for name, function in implementations.items()}
    able, failed = verified(op, case, calls, lambda result: agree(result, expected))
    del arrays, wide, expected, calls
    taken = _in_turns({name: (implementations[name], make) for name in able})
    ceiling = copy_bandwidth()
    return failed + [
        {
            "op": op,
            "case": case,
            "implementation": name,
            "us": round(1e6 * each, 1),
            "GB/s": round(moved * 1e-9 / each),
            "ceiling": round(ceiling),
            "ratio": round(moved * 1e-9 / each / ceiling, 3),
        }
        for name, each in taken.items()
    ]


def normal(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def both(function: Callable[..., Any], **options: Any) -> dict[str, Callable]:
    """`function` by each of its implementations."""
    return {name: functools.partial(function, implementation=name, **options) for name in ("triton", "xla")}
