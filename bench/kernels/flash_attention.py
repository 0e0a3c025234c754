"""Attention of a Llama-3.1-8B layer (32 query heads, 8 key/value heads of 128): each pass against the best there is.

Flops are those of the pairs a causal order leaves, two matrix products forward and five backward; the ceiling is a
square bfloat16 matmul. Peers are cuDNN, and tokamax where it is installed; all are timed in turns. `against_peer` is the
faster peer's time over ours, of Triton's kernels tokamax's Triton's. `deterministic` is what is chosen where gradients have
to be the same every time. The packed case holds 8 documents of 1024 tokens in
a row of 8192; `speedup` is against causal order over the whole row. In the lognormal one documents are 600 tokens long on
average, as `bench.step --packed` has them.

What is checked: cotangents are zero but for some queries, so that gradients of all queries, keys and values follow from
those queries' logits alone, which a reference in float32 can hold at any length.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels._check import agree, verified
from bench.kernels.timing import matmul_rate, times_in_turns
from pallas_kernels.flash_attention import attention_backward, attention_forward, segment_metadata
from pallas_kernels.workloads import ATTENTIONS, LOGNORMAL, PACKED, Attention, attention, lognormal_attention

OP = "flash_attention"
PASSES = {"forward": 1.0, "forward+backward": 3.5}  # flops as multiples of the forward pass's
IMPLEMENTATIONS = {"chosen": None, "triton": "triton"}
OURS = (*IMPLEMENTATIONS, "deterministic")
CHECKED = 64  # queries of a row
LONG = 8192  # beyond it Triton's kernels are not measured: they take seconds


def rows() -> Iterator[dict[str, Any]]:
    results = []
    for shape in map(attention, ATTENTIONS):
        for row in _measure(shape):
            results.append(row)
            yield row
    packed = attention(PACKED)
    whole = f"llama3.1-8b/attention/{packed.rows}x{packed.row_length}"
    yield from _with_speedup(list(_measure(packed)), results, PACKED, whole)
    yield from _measure(lognormal_attention(LOGNORMAL))


def _measure(shape: Attention) -> Iterator[dict[str, Any]]:
    arrays = _inputs(shape)
    few, expected = _some_queries(arrays, shape)
    for name, share in PASSES.items():
        case = f"{shape.name} {name}"
        programs = {other: jax.jit(function) for other, function in _implementations(shape, name).items()}

        def check(result: Any, wanted: tuple = expected if share > 1 else expected[:1]) -> None:
            out, *gradients = result
            agree((out[:, _places(shape)], *gradients), wanted)

        able, failed = verified(OP, case, {other: partial(each, *few) for other, each in programs.items()}, check)
        seconds = times_in_turns({other: partial(programs[other], *arrays) for other in able}) if able else {}
        yield from failed + _with_peers([_row(shape, case, other, each, share) for other, each in seconds.items()])


def _row(shape: Attention, case: str, implementation: str, seconds: float, share: float) -> dict[str, Any]:
    rate, ceiling = share * shape.flops / seconds / 1e12, matmul_rate() / 1e12
    moved = 4 * shape.rows * shape.row_length * (shape.heads + shape.kv_heads) * shape.depth
    return {
        "op": OP,
        "case": case,
        "implementation": implementation,
        "us": round(seconds * 1e6, 1),
        "TFLOP/s": round(rate, 1),
        "ceiling": round(ceiling, 1),
        "ratio": round(rate / ceiling, 3),
        "flops_per_byte": round(share * shape.flops / moved, 1),
    }


def _with_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours with the best peer's name and time over ours."""
    results = []
    for row in rows:
        own = row["implementation"]
        peers = [each for each in rows if each["implementation"] not in OURS]
        if own == "triton":
            peers = [each for each in peers if each["implementation"] == "tokamax triton"]
        best = min(peers, key=lambda each: each["us"], default=None)
        more: dict[str, Any] = {}
        if own in OURS and best is not None:
            more = {"peer": best["implementation"], "against_peer": round(best["us"] / row["us"], 3)}
        results.append(row | more)
    return results


def _with_speedup(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], name: str, whole: str
) -> list[dict[str, Any]]:
    """Rows of `name` with the time that `whole` takes over theirs."""
    times = {(row["case"], row["implementation"]): row["us"] for row in others if "us" in row}
    results = []
    for row in rows:
        other = times.get((row["case"].replace(name, whole), row["implementation"]))
        results.append(row | ({"speedup": round(other / row["us"], 2)} if other and "us" in row else {}))
    return results


def _inputs(shape: Attention) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    size = (shape.rows, shape.row_length)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [jax.random.normal(key, (*size, n, shape.depth), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)]


def _implementations(shape: Attention, which: str) -> dict[str, Callable]:
    make = _forward if which == "forward" else _both
    options: dict[str, Any] = {}
    if _packed(shape):
        options["segment_ids"] = segment_metadata(jnp.asarray(shape.segment_ids))
    names = IMPLEMENTATIONS if shape.row_length <= LONG else {"chosen": None}
    functions = {name: make(implementation, options) for name, implementation in names.items()}
    if which != "forward":
        functions["deterministic"] = make(None, options | {"deterministic": True})
    if not _packed(shape):
        functions |= {"cudnn": make("cudnn", options)} | _tokamax(which, shape)
    return functions


def _packed(shape: Attention) -> bool:
    return any(len(row) > 1 for row in shape.document_lengths)


def _forward(implementation: str | None, options: dict[str, Any]) -> Callable:
    return lambda q, k, v, g: (attention_forward(q, k, v, implementation=implementation, **options)[0],)


def _both(implementation: str | None, options: dict[str, Any]) -> Callable:
    def function(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        out, saved = attention_forward(q, k, v, implementation=implementation, **options)
        return out, *attention_backward(saved, g)

    return function


def _tokamax(which: str, shape: Attention) -> dict[str, Callable]:
    if importlib.util.find_spec("tokamax") is None:
        return {}
    tokamax: Any = importlib.import_module("tokamax")

    def by(implementation: str) -> Callable:
        attend = partial(tokamax.dot_product_attention, is_causal=True, implementation=implementation)

        def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
            out, pullback = jax.vjp(attend, q, k, v)
            return out, *pullback(g)

        return (lambda q, k, v, g: (attend(q, k, v),)) if which == "forward" else both

    names = ("mosaic", "triton") if shape.row_length <= LONG else ("mosaic",)
    return {f"tokamax {name}": by(name) for name in names}


def _places(shape: Attention) -> np.ndarray:
    """Queries of a row that are checked: spread over it, the last among them."""
    return np.linspace(0, shape.row_length - 1, min(CHECKED, shape.row_length), dtype=np.int32)


def _some_queries(arrays: list[jax.Array], shape: Attention) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """The arrays with cotangents for some queries only, and those queries' outputs and all gradients in float32."""
    q, k, v, g = arrays
    places = _places(shape)
    few = jnp.zeros_like(g).at[:, places].set(g[:, places])
    f32 = [x.astype(jnp.float32) for x in (q[:, places], k, v, g[:, places])]

    @jax.jit
    def reference(some, k, v, g):
        out, pullback = jax.vjp(partial(_rows_of_attention, shape), some, k, v)
        dq, dk, dv = pullback(g)
        return out, jnp.zeros(q.shape, jnp.float32).at[:, places].set(dq), dk, dv

    return [q, k, v, few], reference(*f32)


def _rows_of_attention(shape: Attention, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Outputs of the checked queries."""
    places, ids = _places(shape), shape.segment_ids
    seen = (np.arange(shape.row_length) <= places[:, None]) & (ids[:, None, :] == ids[:, places, None])
    exact = jax.lax.Precision.HIGHEST
    q = q.reshape(*q.shape[:2], shape.kv_heads, -1, shape.depth)
    logits = shape.depth**-0.5 * jnp.einsum("bqkgd,bskd->bkgqs", q, k, precision=exact)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, v, precision=exact)
    return out.reshape(*q.shape[:2], shape.heads, shape.depth)
