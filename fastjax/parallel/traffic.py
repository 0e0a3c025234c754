"""Bytes that a device sends to others, counted in a traced program by its collectives.

Of n devices and B bytes that the collective gives out on each (a reduce-scatter: takes in), by a ring:

    all_gather, all_to_all, reduce_scatter   (n - 1) / n  B
    psum, pmin, pmax                         2 (n - 1) / n  B, as a reduce-scatter and an all-gather
    ppermute                                 B

A loop's body counts as often as it runs; where its count is not known from the trace, or a branch is chosen at run time,
counting is refused if there are collectives in it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

ONCE = ("all_gather", "all_to_all", "ppermute")
TWICE = ("psum", "pmin", "pmax")


def sent_bytes(program: Any, sizes: Mapping[str, int] | None = None) -> float:
    """By one device, in one call of a program such as `jax.make_jaxpr(f)(...)` gives; `sizes` are those of its axes."""
    return sum(_of_equation(equation, dict(sizes or {})) for equation in program.eqns)


def _of_equation(equation: Any, sizes: dict[str, int]) -> float:
    name, params = equation.primitive.name, equation.params
    if name in (*ONCE, *TWICE, "reduce_scatter"):
        axes = params.get("axes", params.get("axis_name"))
        n = math.prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
        values = equation.invars if name == "reduce_scatter" else equation.outvars
        size = sum(value.aval.size * value.aval.dtype.itemsize for value in values)
        return size * (1.0 if name == "ppermute" else (n - 1) / n * (2 if name in TWICE else 1))
    if name == "shard_map":
        sizes = sizes | dict(params["mesh"].shape)
    inside = sum(sent_bytes(each, sizes) for each in _programs_in(params))
    if name in ("while", "cond") and inside:
        raise ValueError(f"how often the collectives in a {name} run is not known before it runs.")
    return inside * (params["length"] if name == "scan" else 1)


def _programs_in(params: Mapping[str, Any]) -> list[Any]:
    """Of an equation; jax has one class for them or two, by its version."""
    leaves = jax.tree.leaves(dict(params), is_leaf=lambda value: hasattr(value, "eqns"))
    return [value for value in leaves if hasattr(value, "eqns")]
