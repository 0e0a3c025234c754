"""What runs on the device: prompts into a cache, newcomers into the slots of a batch, tokens of all slots in a loop.

With drafts (prompt lookup), a step proposes how the text might go on by what followed its last tokens where they stood
before, runs the proposed tokens behind the next one in one pass, and keeps those that the model would have chosen itself,
one after the other, with the row's own draws. So a row's text is that of plain decoding, greedy or drawn, in fewer passes.

On a mesh each device does this with its own rows and its share of the model (layout.py). Slots are rows, and a newcomer's
prompt is run on the device that has its slot: nothing of a cache is ever sent.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fastjax.generate.cache import KVCache, grown
from fastjax.generate.forward import PreparedLayers, all_logits, extend, next_logits, prepared_layers
from fastjax.generate.layout import Layout
from fastjax.generate.sampling import RowSampling, choose
from fastjax.models.llama import Llama
from pallas_kernels.decode_attention import as_integers

LONGEST_MATCH = 3  # last tokens that are looked for; fewer where they stand nowhere else


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All that a step changes. Everything is of the rows of the batch."""

    cache: KVCache
    logits: Float[Array, "B V"]  # of the next token
    seen: Bool[Array, "B V"]  # tokens in the text so far
    made: Int[Array, "B"]  # tokens made
    left: Int[Array, "B"]  # tokens that may still be made; 0: the row rests
    stops: Int[Array, "B E"]  # tokens that end a text, -1 for none
    text: Int[Array, "B C"] | None = None  # all tokens, where drafts are looked up in them
    own: Float[Array, "B R"] | None = None  # the columns of each row's adapter, where there are several


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=(2,))
def read_prompts(
    layout: Layout,
    parameters: nnx.State,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    first: bool,
    own: jax.Array | None = None,
    logits: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """The logits after the next part of each prompt, and the cache with it; of a prompt that has ended before, `logits`."""

    def program(parameters: nnx.State, cache: KVCache, tokens: jax.Array, counts: jax.Array, own: Any, before: Any):
        model, share = layout.model(parameters)
        layers = prepared_layers(model, share)
        hidden, cache = extend(model, layers, cache, tokens, counts, first=first, own=own)
        after = next_logits(model, hidden, counts, share)
        return after if before is None else jnp.where((counts > 0)[:, None], after, before), cache

    rows = (cache, tokens, counts, own, logits)
    return layout.divided(program, parameters, *rows, out=lambda: (layout.rows, layout.of_rows(cache)))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def admit(
    layout: Layout,
    slots: Slots,
    rows: jax.Array,
    cache: KVCache,
    logits: jax.Array,
    seen: jax.Array,
    left: jax.Array,
    stops: jax.Array,
    text: jax.Array | None,
    own: jax.Array | None,
) -> Slots:
    """`slots` with newcomers at `rows`, of those that the newcomer's device has; past its last, one goes nowhere."""
    width = cache.capacity

    def program(_: None, slots: Slots, rows: jax.Array, cache: KVCache, *rest: jax.Array | None) -> Slots:
        logits, seen, left, stops, text, own = rest

        def place(old: Any, new: Any) -> Any:
            return None if old is None else old.at[rows].set(new, mode="drop")

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            both = as_integers(old).at[:, rows, :, :width].set(as_integers(new), mode="drop")
            return jax.lax.bitcast_convert_type(both, old.dtype)

        return Slots(
            KVCache(jax.tree.map(put, slots.cache.stack, cache.stack), place(slots.cache.lengths, cache.lengths)),
            place(slots.logits, logits),
            place(slots.seen, seen),
            place(slots.made, jnp.zeros_like(rows)),
            place(slots.left, left),
            place(slots.stops, stops),
            None if slots.text is None or text is None else slots.text.at[rows, :width].set(text, mode="drop"),
            place(slots.own, own),
        )

    newcomers = (rows, cache, logits, seen, left, stops, text, own)
    return layout.divided(program, None, slots, *newcomers, out=lambda: layout.of_rows(slots))


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2,))
def decode(
    layout: Layout, parameters: nnx.State, slots: Slots, sampling: RowSampling, steps: int, drafts: int = 0
) -> tuple[Slots, Int[Array, "B steps+drafts"], Float[Array, "B steps+drafts"]]:
    """Up to `steps` more tokens of each row that does not rest, -1 behind them, and their log-probabilities.

    With `drafts`, so many are looked up in each pass, until some row has made `steps`.
    """
    loop = (
        partial(_tokens, layout, steps=steps) if not drafts else partial(_drafted, layout, steps=steps, drafts=drafts)
    )

    def program(parameters: nnx.State, slots: Slots, sampling: RowSampling) -> tuple[Slots, jax.Array, jax.Array]:
        slots, tokens, logprobs = loop(parameters, slots, sampling)
        return slots, layout.everywhere(tokens), layout.everywhere(logprobs)

    whole = PartitionSpec()
    return layout.divided(program, parameters, slots, sampling, out=lambda: (layout.of_rows(slots), whole, whole))


def _tokens(
    layout: Layout, parameters: nnx.State, slots: Slots, sampling: RowSampling, steps: int
) -> tuple[Slots, Int[Array, "B steps"], Float[Array, "B steps"]]:
    model, share = layout.model(parameters)
    batch = slots.left.shape[0]
    layers = prepared_layers(model, share, batch)

    def step(carry: tuple) -> tuple:
        index, _, slots, tokens, logprobs = carry
        chosen = choose(slots.logits, slots.seen, slots.made, sampling)
        works = slots.left > 0
        log_p = _log_p(slots.logits, chosen, sampling.is_greedy)
        tokens = tokens.at[:, index].set(jnp.where(works, chosen, -1))
        logprobs = logprobs.at[:, index].set(jnp.where(works, log_p, 0.0))
        ended = jnp.any(chosen[:, None] == slots.stops, axis=1)
        counts = works.astype(jnp.int32)
        hidden, cache = extend(model, layers, slots.cache, chosen[:, None], counts, first=False, own=slots.own)
        slots = Slots(
            cache,
            next_logits(model, hidden, jnp.ones_like(counts), share),
            slots.seen.at[jnp.arange(batch), chosen].max(works),
            slots.made + counts,
            jnp.where(works & ~ended, slots.left - 1, 0),
            slots.stops,
            slots.text,
            slots.own,
        )
        index += 1
        return index, layout.anywhere((index < steps) & jnp.any(slots.left > 0)), slots, tokens, logprobs

    nothing = jnp.full((batch, steps), -1, jnp.int32), jnp.zeros((batch, steps), jnp.float32)
    start = (jnp.int32(0), layout.anywhere(jnp.any(slots.left > 0)), slots, *nothing)
    return jax.lax.while_loop(lambda carry: carry[1], step, start)[2:]


def _drafted(
    layout: Layout, parameters: nnx.State, slots: Slots, sampling: RowSampling, steps: int, drafts: int
) -> tuple[Slots, Int[Array, "B steps+drafts"], Float[Array, "B steps+drafts"]]:
    model, share = layout.model(parameters)
    batch = slots.left.shape[0]
    layers = prepared_layers(model, share, batch * (1 + drafts))
    rows = jnp.arange(batch)[:, None]
    width = steps + drafts

    def goes_on(filled: jax.Array, left: jax.Array) -> jax.Array:
        return ~layout.anywhere(filled.max() >= steps) & layout.anywhere(jnp.any(left > 0))

    def step(carry: tuple) -> tuple:
        filled, _, slots, tokens, logprobs = carry
        new, log_p, slots = drafted_step(model, layers, slots, sampling, drafts)
        places = jnp.where(new >= 0, filled[:, None] + jnp.arange(drafts + 1, dtype=filled.dtype)[None], width)
        tokens = tokens.at[rows, places].set(new, mode="drop")
        logprobs = logprobs.at[rows, places].set(log_p, mode="drop")
        filled += jnp.sum(new >= 0, axis=1, dtype=filled.dtype)
        return filled, goes_on(filled, slots.left), slots, tokens, logprobs

    filled = jnp.zeros(batch, jnp.int32)
    nothing = jnp.full((batch, width), -1, jnp.int32), jnp.zeros((batch, width), jnp.float32)
    start = (filled, goes_on(filled, slots.left), slots, *nothing)
    return jax.lax.while_loop(lambda carry: carry[1], step, start)[2:]


def drafted_step(
    model: Llama, layers: PreparedLayers, slots: Slots, sampling: RowSampling, drafts: int
) -> tuple[Int[Array, "B 1+drafts"], Float[Array, "B 1+drafts"], Slots]:
    """One pass: the tokens that each row makes in it, -1 behind them, and their log-probabilities."""
    assert slots.text is not None
    batch, lengths = slots.left.shape[0], slots.cache.lengths
    rows = jnp.arange(batch)
    first = choose(slots.logits, slots.seen, slots.made, sampling)
    text = slots.text.at[rows, lengths].set(first, mode="drop")
    proposed, count = looked_up(text, lengths + 1, drafts)
    ids = jnp.concatenate([first[:, None], jnp.maximum(proposed, 0)], axis=1)
    works = slots.left > 0
    counts = jnp.where(works, 1 + count, 0)
    hidden, cache = extend(model, layers, slots.cache, ids, counts, first=False, own=slots.own)
    logits = all_logits(model, hidden, layers.share)
    # token i stands if all before it do, if it is what the model chooses there, and if the text does not end before
    greedy = sampling.is_greedy
    stands, seen, log_p = [works], slots.seen, [_log_p(slots.logits, first, greedy)]
    for i in range(drafts + 1):
        seen = seen.at[rows, ids[:, i]].max(stands[i])
        if i == drafts:
            break
        chosen = choose(logits[:, i], seen, slots.made + i + 1, sampling)
        ended = jnp.any(ids[:, i : i + 1] == slots.stops, axis=1)
        stands.append(stands[i] & ~ended & (chosen == proposed[:, i]) & (i + 1 < jnp.minimum(slots.left, 1 + count)))
        log_p.append(_log_p(logits[:, i], chosen, greedy))
    kept = jnp.stack(stands, axis=1)
    made = jnp.sum(kept, axis=1, dtype=jnp.int32)
    last = jnp.maximum(made - 1, 0)
    ended = jnp.any(ids[rows, last][:, None] == slots.stops, axis=1)
    places = jnp.where(kept, lengths[:, None] + jnp.arange(drafts + 1, dtype=lengths.dtype)[None], text.shape[1])
    slots = Slots(
        KVCache(cache.stack, lengths + made),
        jnp.where(works[:, None], logits[rows, last], slots.logits),
        seen,
        slots.made + made,
        jnp.where(works & ~ended, slots.left - made, 0),
        slots.stops,
        slots.text.at[rows[:, None], places].set(ids, mode="drop"),
        slots.own,
    )
    return jnp.where(kept, ids, -1), jnp.stack(log_p, axis=1), slots


def looked_up(
    text: Int[Array, "B C"], lengths: Int[Array, "B"], drafts: int
) -> tuple[Int[Array, "B drafts"], Int[Array, "B"]]:
    """What followed the last tokens of each row where they stood latest before, -1 past its end, and how many there are.

    The longest run of last tokens that stood before counts, of up to LONGEST_MATCH.
    """
    capacity = text.shape[1]
    place = jnp.arange(capacity, dtype=lengths.dtype)[None]
    after = jnp.full_like(lengths, -1)  # where the match's continuation begins
    same = jnp.ones(text.shape, bool)
    for size in range(1, LONGEST_MATCH + 1):
        wanted = jnp.take_along_axis(text, jnp.maximum(lengths - size, 0)[:, None], axis=1)
        # the token `size` before a place: is it that many before the end?
        earlier = jnp.roll(text, size, axis=1)
        same &= (earlier == wanted) & (place >= size) & (place < lengths[:, None])
        found = jnp.max(jnp.where(same, place, -1), axis=1)
        after = jnp.where(found >= 0, found, after)
    places = after[:, None] + jnp.arange(drafts, dtype=lengths.dtype)[None]
    there = (after >= 0)[:, None] & (places < lengths[:, None])
    drafted = jnp.take_along_axis(text, jnp.clip(places, 0, capacity - 1), axis=1)
    return jnp.where(there, drafted, -1), jnp.sum(there, axis=1, dtype=jnp.int32)


def _log_p(logits: Float[Array, "B V"], chosen: Int[Array, "B"], highest: bool) -> Float[Array, "B"]:
    """`highest` says that the chosen ones are: then there is no need to look for the highest logits once more."""
    if not highest:
        return jax.nn.log_softmax(logits, axis=-1)[jnp.arange(logits.shape[0]), chosen]
    top = jnp.take_along_axis(logits, chosen[:, None], axis=1)
    return -jnp.log(jnp.sum(jnp.exp(logits - top), axis=1))


@partial(jax.jit, static_argnums=(0, 2))
def with_capacity(layout: Layout, slots: Slots, capacity: int) -> Slots:
    """The same with room for longer texts."""

    def program(_: None, slots: Slots) -> Slots:
        text = slots.text
        if text is not None:
            text = jnp.pad(text, ((0, 0), (0, capacity - slots.cache.capacity)))
        return dataclasses.replace(slots, cache=grown(slots.cache, capacity), text=text)

    return layout.divided(program, None, slots, out=lambda: layout.of_rows(slots))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def stopped(layout: Layout, slots: Slots, rows: jax.Array) -> Slots:
    """The same, where `rows` says so at rest."""

    def program(_: None, slots: Slots, rows: jax.Array) -> Slots:
        return dataclasses.replace(slots, left=jnp.where(rows, 0, slots.left))

    return layout.divided(program, None, slots, rows, out=lambda: layout.of_rows(slots))
