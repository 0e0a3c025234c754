"""Causal attention of rows that are divided over a mesh axis (`sequence.py`): keys and values travel around a ring.

A device attends to its own two chunks at once, in causal order. Then, for each of the others, the chunks of its keys and
values come by, and of the pairs of chunks exactly two are wholly in the past, whichever device it is:

    visitor before me   my late queries to its early keys, my early queries to its early keys
    visitor after me    my late queries to its early keys, my late queries to its late keys

These are one call of the kernel, without causal order, twice as many rows of half the length: the same on every device at
every step. The sets of keys that a query has met are joined one at a time, in float32, by their log-sum-exps
(pallas_kernels.flash_attention.parts), to the output o and the log-sum-exp l of all. In the backward pass p = exp(t - l) is
the weight of a pair whatever else its query saw, so the kernels' own backward pass, given o and l of all, makes a set's
share of the gradients. The gradients of keys and values follow them around, in float32, and are home after the last step.

What is sent is asked for before the work that it travels under: the next keys and values before attention to the present
ones, gradients one step behind. Backward ends with the device's own chunks, under which gradients come home.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastjax.parallel.sequence import SequenceSplit
from pallas_kernels.flash_attention import (
    SegmentMetadata,
    attention_forward,
    attention_part_backward,
    joined,
    known,
    segment_metadata,
)
from pallas_kernels.ordering import after, zero_after

F32 = jnp.float32


class Step(NamedTuple):
    """A visitor's pairs with this device's queries; with a leading axis, those of all visitors."""

    before: Bool[Array, ""]  # the visitor's chunks lie around mine: its early one before, its late one after
    segments: SegmentMetadata | None  # of the 2B rows of the kernel's call
    seen: Bool[Array, "2B C"] | None  # which queries see a key; None: all


@partial(jax.tree_util.register_dataclass, meta_fields=("split",), data_fields=("own", "steps"))
@dataclass(frozen=True)
class Ring:
    """What a batch's rows mean for attention around the ring: made once, outside the layers."""

    split: SequenceSplit
    own: SegmentMetadata | None
    steps: Step

    @classmethod
    def of(cls, split: SequenceSplit, segment_ids: Int[Array, "B S"] | None) -> "Ring":
        """`segment_ids` are those of whole rows, as on every device."""
        visitors, me = split.visitors(), jax.lax.axis_index(split.axis)
        before = visitors < me
        if segment_ids is None:
            return cls(split, None, Step(before, None, None))
        chunks, last = split.chunks(segment_ids), 2 * split.devices - 1
        late = jnp.broadcast_to(chunks[last - me], (len(visitors), *chunks.shape[1:]))
        queries = jnp.concatenate([late, chunks[jnp.where(before, me, last - me)]], axis=1)
        keys = jnp.concatenate([chunks[visitors], chunks[jnp.where(before, visitors, last - visitors)]], axis=1)
        steps = Step(before, jax.vmap(segment_metadata)(queries, keys), jax.vmap(jax.vmap(_among))(queries, keys))
        return cls(split, segment_metadata(split.own(segment_ids)), steps)


def _among(ids: Int[Array, "C"], keys: Int[Array, "C"]) -> Bool[Array, "C"]:
    """Which ids are of a segment that the keys have too."""
    ordered = jnp.sort(keys)
    found = ordered[jnp.minimum(jnp.searchsorted(ordered, ids), len(keys) - 1)]
    return (found == ids) & (ids != 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingSaved:
    """What `ring_attention_backward` needs: of this device's part of the rows."""

    q: Float[Array, "B S N D"]
    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K D"]
    out: Float[Array, "B S N D"]
    lse: Float[Array, "B N S"]

    @property
    def qkv(self) -> tuple[Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        return self.q, self.k, self.v


def ring_attention_forward(
    q: Float[Array, "B S N D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], ring: Ring
) -> tuple[Float[Array, "B S N D"], RingSaved]:
    """Causal attention to whole rows, for this device's queries."""
    send, half = ring.split.sent_on, q.shape[1] // 2

    def visit(carry: Any, step: Step, *, last: bool = False, **_: bool) -> Any:
        visitor, total = carry
        following = visitor if last else send(visitor)
        queries, keys = _Halves(half, step.before, True), _Halves(half, step.before, False)
        pair = attention_forward(queries(q), *keys.of_both(visitor), causal=False, segment_ids=step.segments)[1]
        return following, _joined(total, (pair.out, known(pair.lse, step.seen)), queries.starts)

    first = send(jnp.stack([k, v]))
    own = attention_forward(q, k, v, causal=True, segment_ids=ring.own)[1]
    real = None if ring.own is None else ring.own.ids[:, 0, : q.shape[1]] != 0
    _, (out, lse) = _around(visit, (first, (own.out.astype(F32), known(own.lse, real))), ring.steps)
    out, lse = out.astype(q.dtype), jnp.where(lse == -jnp.inf, 0, lse)
    return out, RingSaved(q, k, v, out, lse)


def ring_attention_backward(
    saved: RingSaved, g: Float[Array, "B S N D"], ring: Ring
) -> tuple[Float[Array, "B S N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """(dq, dk, dv) of this device's part, for cotangents g of its outputs."""
    q, k, v, send, half = saved.q, saved.k, saved.v, ring.split.sent_on, saved.q.shape[1] // 2

    def visit(carry: Any, step: Step, *, first: bool = False, last: bool = False) -> Any:
        visitor, dq, dkv = carry
        dkv = dkv if first else send(dkv)
        following = visitor if last else send(visitor)
        queries, keys = _Halves(half, step.before, True, now), _Halves(half, step.before, False)
        dq_pair, dk_pair, dv_pair = attention_part_backward(
            queries(q), *keys.of_both(visitor), queries(saved.out), queries(saved.lse, axis=2), queries(g),
            causal=False, segment_ids=step.segments,
        )  # fmt: skip
        dkv = jnp.stack([keys.added(dkv[0], dk_pair), keys.added(dkv[1], dv_pair)])
        return following, queries.added(dq, dq_pair), dkv

    # pairs and visitors are made again when g is there: shared with the forward pass, they would stay in memory since then
    now, kv = zero_after(g), jnp.stack([after(k, g), v])
    start = send(kv), jnp.zeros(q.shape, F32), jnp.zeros(kv.shape, F32)
    _, dq, dkv = _around(visit, start, ring.steps)
    dkv = send(dkv)
    own = attention_part_backward(q, k, v, saved.out, saved.lse, g, causal=True, segment_ids=ring.own)
    dq, dk, dv = ((x + y.astype(F32)).astype(q.dtype) for x, y in zip((dq, *dkv), own, strict=True))
    return dq, dk, dv


@dataclass(frozen=True)
class _Halves:
    """The chunks that a visit pairs, of my queries or of the visitor's keys: two after each other among the rows."""

    length: int
    before: Bool[Array, ""]
    of_queries: bool
    zero: Int[Array, ""] | int = 0  # that is known only when it is time to take them

    @property
    def starts(self) -> tuple[Any, Any]:
        first, other = self.length if self.of_queries else 0, jnp.where(self.before, 0, self.length)
        return first + self.zero, other + self.zero

    def __call__(self, x: Array, axis: int = 1) -> Array:
        """[B, ..., 2C, ...] -> [2B, ..., C, ...]."""
        return jnp.concatenate([_half(x, start, self.length, axis) for start in self.starts])

    def of_both(self, kv: Float[Array, "2 B S K D"]) -> tuple[Array, Array]:
        return self(kv[0]), self(kv[1])

    def added(self, total: Float[Array, "B S N D"], pair: Float[Array, "2B C N D"]) -> Float[Array, "B S N D"]:
        for start, part in zip(self.starts, jnp.split(pair, 2), strict=True):
            total = _with_half(total, _half(total, start, self.length) + part.astype(F32), start)
        return total


def _half(x: Array, start: Any, length: int, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis)


def _with_half(x: Array, half: Array, start: Any, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, half, start, axis)


def _joined(total: tuple[Array, Array], pair: tuple[Array, Array], starts: tuple[Any, Any]) -> tuple[Array, Array]:
    """Output and log-sum-exp after the sets of keys in `pair`."""
    out, lse = total
    for start, pair_out, pair_lse in zip(starts, *(jnp.split(x, 2) for x in pair), strict=True):
        length = pair_out.shape[1]
        halves = _half(out, start, length), _half(lse, start, length, axis=2)
        out_half, lse_half = joined(halves, (pair_out, pair_lse))
        out, lse = _with_half(out, out_half, start), _with_half(lse, lse_half, start, axis=2)
    return out, lse


def _around(visit: Callable, carry: Any, steps: Step) -> Any:
    """The carry after all visits. The first and the last send less and are apart; those between are a loop, whose turns
    keep one visitor in memory at a time.
    """
    count = len(steps.before)

    def at(index: Any) -> Step:
        return jax.tree.map(lambda x: x[index], steps)

    carry = visit(carry, at(0), first=True, last=count == 1)
    if count > 2:
        carry, _ = jax.lax.scan(lambda carry, step: (visit(carry, step), None), carry, at(slice(1, -1)))
    return carry if count == 1 else visit(carry, at(-1), last=True)
