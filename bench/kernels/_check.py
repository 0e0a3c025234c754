"""Nothing is timed that computes the wrong thing: results on the very arrays that will be timed, against a reference."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

BOUND = 1e-2  # of the reference's norm: bfloat16's rounding, and not much more


class Disagreement(RuntimeError):
    """A result that is not its reference's."""


def agree(got: Any, expected: Any, bound: float = BOUND) -> None:
    """Every array of a result within `bound` of the reference's norm; NaN never is, nor anything of a zero reference."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        error = float(_error(a, b))
        if not error <= bound:
            raise Disagreement(f"{a.dtype}{a.shape} is off by {error:.2g} of its reference's norm; {bound} is allowed.")


def same(got: Any, expected: Any) -> None:
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        unequal = int(_unequal(a, b))
        if unequal:
            raise Disagreement(f"{unequal} of {a.size} values of {a.dtype}{a.shape} are not their reference's.")


@jax.jit
def _error(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).reshape(-1)) / jnp.linalg.norm(b.reshape(-1))


@jax.jit
def _unequal(a: jax.Array, b: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    bits = (jax.lax.bitcast_convert_type(x, unsigned) for x in (a, b))
    return jnp.sum(jnp.not_equal(*bits), dtype=jnp.int32)


def verified(
    op: str, case: str, calls: Mapping[str, Callable[[], Any]], check: Callable[[Any], None]
) -> tuple[dict[str, Callable[[], Any]], list[dict[str, Any]]]:
    """The calls whose results pass `check`, and a row for each of the others that says what is wrong."""
    able, failed = {}, []
    for name, call in calls.items():
        try:
            check(call())
        except Exception as error:  # one implementation's failure must not cost the others' measurements
            traceback.print_exc()
            failed.append(failed_row(op, case, name, error))
        else:
            able[name] = call
    return able, failed


def failed_row(op: str, case: str, implementation: str, error: Exception) -> dict[str, Any]:
    reason = str(error).strip().splitlines() or [""]
    return {
        "op": op,
        "case": case,
        "implementation": implementation,
        "failed": f"{type(error).__name__}: {reason[0][:200]}",
    }
