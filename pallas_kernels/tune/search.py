"""Trying candidates: each is compiled, checked against the reference on random data, and only then timed.

All that passed are timed in turns, a round of each, as a card at its power limit slows down as it warms up. One program
calls an op on several sets of arguments, so that no launch leaves a gap and no argument is found in the cache. The default
stays unless another is faster by more than what two runs differ by.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tuning import Entry, build, trying

COPIES = 4
ROUNDS, CALLS = 7, 3
MARGIN = 0.02  # of the default's time
Timer = Callable[[Mapping[Any, Callable[[], Any]]], dict[Any, float]]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Tunable:
    """One choice of an op for one shape.

    Attributes:
        op, shape: what the op asks `choice` for.
        default: what it would get without a table.
        candidates: the fields of what may be better; those that their class refuses are left out.
        make: random arguments from a seed.
        run: the op on them, with the choice that is in force when it is traced.
        reference: the same result, however slowly.
        bound: of the difference, as a share of the reference's norm; 0 for the same values.
    """

    op: str
    shape: dict[str, int | str]
    default: Any
    candidates: Sequence[dict[str, Any]]
    make: Callable[[int], tuple]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    bound: float = 1e-2
    workload: str | None = None

    def choices(self, log: Log) -> list[Any]:
        """The default and every other candidate, each once."""
        found = [self.default]
        for fields in self.candidates:
            try:
                candidate = build(type(self.default), fields, self.op)
            except ValueError as error:
                log(f"{self.op}: {fields} left out: {error}")
                continue
            if candidate not in found:
                found.append(candidate)
        return found


@dataclass
class Session:
    """Choices found so far stay in force for those that build on them, until the session ends."""

    timer: Timer
    log: Log
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        jax.clear_caches()

    def tune(self, tunable: Tunable) -> Entry:
        """The fastest candidate that is right, or the default."""
        arguments = [tunable.make(seed) for seed in range(COPIES)]
        expected = jax.jit(tunable.reference)(*arguments[0])
        _refuse_zeros(expected, tunable)
        programs = {}
        for candidate in tunable.choices(self.log):
            reason, program = self._compiled(tunable, candidate, arguments, expected)
            if program is None:
                self.log(f"{tunable.op} {tunable.shape}: {candidate} left out: {reason}")
            else:
                programs[candidate] = program
        if not programs:
            raise RuntimeError(f"{tunable.op} {tunable.shape}: no candidate gave the right result.")
        seconds = self.timer(programs)
        best = min(seconds, key=lambda candidate: seconds[candidate])
        default = seconds.get(tunable.default)
        if default is not None and seconds[best] > (1 - MARGIN) * default:
            best = tunable.default
        self.stack.enter_context(trying(tunable.op, best, **tunable.shape))
        shown = "not able" if default is None else f"{1e6 * default:.1f} us"
        self.log(f"{tunable.op} {tunable.shape}: {best}, {1e6 * seconds[best]:.1f} us; default {shown}")
        each = round(1e6 * seconds[best], 2), None if default is None else round(1e6 * default, 2)
        return Entry(tunable.op, tunable.shape, asdict(best), *each, tunable.workload)

    def _compiled(
        self, tunable: Tunable, candidate: Any, arguments: list[tuple], expected: Any
    ) -> tuple[str, Callable[[], Any] | None]:
        """("", a call on all sets of arguments), or why there is none."""
        jax.clear_caches()  # a function within was traced with another candidate
        with trying(tunable.op, candidate, **tunable.shape):
            try:
                program = jax.jit(lambda sets: [tunable.run(*each) for each in sets]).lower(arguments).compile()
                error = worst_error(program(arguments)[0], expected)
            except Exception as failure:  # too much shared memory, say: what a compiler says of it differs
                return f"{type(failure).__name__}: {str(failure).strip()[:200]}", None
        if not error <= tunable.bound:
            return f"off by {error:.2g} of the reference's norm; {tunable.bound} is allowed", None
        return "", lambda: program(arguments)


def _refuse_zeros(expected: Any, tunable: Tunable) -> None:
    for leaf in jax.tree.leaves(expected):
        norm = float(jnp.linalg.norm(leaf.astype(jnp.float32).reshape(-1)))
        if not 0 < norm < float("inf"):
            raise RuntimeError(
                f"{tunable.op} {tunable.shape}: a reference of norm {norm} tells nothing right from wrong."
            )


def worst_error(got: Any, expected: Any) -> float:
    """The largest difference of any array, as a share of the reference's norm."""
    return max(map(float, jax.tree.leaves(jax.tree.map(_error, got, expected))))


@jax.jit
def _error(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32).reshape(-1), b.astype(jnp.float32).reshape(-1)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def in_turns(programs: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median seconds of a call on one set of arguments."""
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS + 1):
        for name, program in programs.items():
            jax.block_until_ready(program())
            start = time.perf_counter()
            results = [program() for _ in range(CALLS)]
            jax.block_until_ready(results)
            times[name].append((time.perf_counter() - start) / (CALLS * COPIES))
            del results
    return {name: statistics.median(each[1:]) for name, each in times.items()}
