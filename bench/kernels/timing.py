"""Time on the GPU alone, and the ceilings that times are held against.

A call's time is the sum of its kernels' and copies' durations as the profiler records them: gaps between launches do
not count, and nothing can be hoisted or dropped, since every call is a launch of the whole program. Where operands fit
in the cache (50 MB on an H200), give several sets of them, used in turn. What is compared with each other is timed in
turns, a round of each, as a card at its power limit slows down as it warms up.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.trace import Kernel, traced_kernels

CALLS = 24
ROUNDS = 9
PAUSE_S, GAP_NS = 4e-3, 1.5e6  # after a call that is told from the next; what is taken for such a pause
TRIES = 3


def device_time(function: Callable, *arguments: Any, more: Sequence[tuple] = (), calls: int = CALLS) -> float:
    """Median seconds of GPU time of one call; `more`: further argument lists, used in turn with the first."""
    sets = [arguments, *more]
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready([program(*each) for each in sets])

    def run() -> None:
        for i in range(calls):
            jax.block_until_ready(program(*sets[i % len(sets)]))

    return statistics.median(per_call(traced_kernels(run), calls)) / 1e9


def per_call(kernels: Sequence[Kernel], calls: int) -> list[float]:
    """Nanoseconds of each of `calls` calls, which all launch the same kernels, one call after the other."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    if not ordered or len(ordered) % calls:
        raise RuntimeError(f"the profiler saw {len(ordered)} kernels in {calls} calls; they should be as many in each.")
    each = len(ordered) // calls
    return [sum(kernel.duration for kernel in ordered[i : i + each]) for i in range(0, len(ordered), each)]


def times_in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of GPU time of each call."""
    for call in calls.values():
        jax.block_until_ready(call())

    def run() -> None:
        for _ in range(rounds):
            for call in calls.values():
                jax.block_until_ready(call())
                time.sleep(PAUSE_S)

    for _ in range(TRIES):
        groups = bursts(traced_kernels(run))
        if len(groups) == rounds * len(calls):
            return {name: statistics.median(groups[i :: len(calls)]) / 1e9 for i, name in enumerate(calls)}
    # a host that halts within a call makes two bursts of it: then by themselves, where kernels can be counted
    return {name: _alone(call, rounds) for name, call in calls.items()}


def _alone(call: Callable[[], Any], rounds: int) -> float:
    def run() -> None:
        for _ in range(rounds):
            jax.block_until_ready(call())

    return statistics.median(per_call(traced_kernels(run), rounds)) / 1e9


def bursts(kernels: Sequence[Kernel]) -> list[float]:
    """Nanoseconds of the kernels between one pause and the next."""
    totals: list[float] = []
    reached = float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.start - reached > GAP_NS:
            totals.append(0.0)
        totals[-1] += kernel.duration
        reached = max(reached, kernel.start + kernel.duration)
    return totals


@functools.cache
def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a device copy of so many random bytes."""
    source = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    return 2 * source.nbytes / device_time(jnp.copy, source)


@functools.cache
def matmul_rate(width: int = 8192) -> float:
    """Flops per second of a square bfloat16 matmul."""
    a, b = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    return 2 * width**3 / device_time(jnp.matmul, a, b)
