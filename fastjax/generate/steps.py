"""What runs on the device: prompts into a cache, newcomers into the slots of a batch, tokens of all slots in a loop.

With drafts (prompt lookup), a step proposes how the text might go on by what followed its last tokens where they stood
before, runs the proposed tokens behind the next one in one pass, and keeps those that the model would have chosen itself,
one after the other, with the row's own draws. So a row's text is that of plain decoding, greedy or drawn, in fewer passes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastjax.generate.cache import KVCache, grown
from fastjax.generate.forward import PreparedLayers, extend, next_logits, prepared_layers
from fastjax.generate.sampling import RowSampling, choose
from fastjax.models.layers import dense_matmul
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
    definition: nnx.GraphDef,
    parameters: nnx.State,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    first: bool,
    own: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    model = nnx.merge(definition, parameters)
    hidden, cache = extend(model, prepared_layers(model), cache, tokens, counts, first=first, own=own)
    return next_logits(model, hidden, counts), cache


@partial(jax.jit, donate_argnums=(0,))
def admit(
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
    """`slots` with newcomers at `rows`; a row past the last slot goes nowhere."""
    place = lambda old, new: old.at[rows].set(new, mode="drop")  # noqa: E731
    width = cache.capacity
    texts = None if slots.text is None or text is None else slots.text.at[rows, :width].set(text, mode="drop")

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
        texts,
        None if slots.own is None else place(slots.own, own),
    )


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=(2,))
def decode(
    definition: nnx.GraphDef, parameters: nnx.State, slots: Slots, sampling: RowSampling, steps: int
) -> tuple[Slots, Int[Array, "B steps"], Float[Array, "B steps"]]:
    """Up to `steps` more tokens of each row that does not rest, -1 where it does, and their log-probabilities."""
    model = nnx.merge(definition, parameters)
    layers, batch = prepared_layers(model), slots.left.shape[0]

    def step(carry: tuple) -> tuple:
        index, slots, tokens, logprobs = carry
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
            next_logits(model, hidden, jnp.ones_like(counts)),
            slots.seen.at[jnp.arange(batch), chosen].max(works),
            slots.made + counts,
            jnp.where(works & ~ended, slots.left - 1, 0),
            slots.stops,
            slots.text,
            slots.own,
        )
        return index + 1, slots, tokens, logprobs

    start = (jnp.int32(0), slots, jnp.full((batch, steps), -1, jnp.int32), jnp.zeros((batch, steps), jnp.float32))
    _, slots, tokens, logprobs = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(carry[1].left > 0), step, start
    )
    return slots, tokens, logprobs


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2,))
def decode_drafted(
    definition: nnx.GraphDef, parameters: nnx.State, slots: Slots, sampling: RowSampling, steps: int, drafts: int
) -> tuple[Slots, Int[Array, "B steps+drafts"], Float[Array, "B steps+drafts"]]:
    """The same tokens as `decode`, with up to `drafts` looked up in each pass; until some row has made `steps` of them."""
    model = nnx.merge(definition, parameters)
    layers, batch = prepared_layers(model), slots.left.shape[0]
    rows = jnp.arange(batch)[:, None]
    width = steps + drafts

    def step(carry: tuple) -> tuple:
        filled, slots, tokens, logprobs = carry
        new, log_p, slots = drafted_step(model, layers, slots, sampling, drafts)
        places = jnp.where(new >= 0, filled[:, None] + jnp.arange(drafts + 1, dtype=filled.dtype)[None], width)
        tokens = tokens.at[rows, places].set(new, mode="drop")
        logprobs = logprobs.at[rows, places].set(log_p, mode="drop")
        return filled + jnp.sum(new >= 0, axis=1, dtype=filled.dtype), slots, tokens, logprobs

    start = (
        jnp.zeros(batch, jnp.int32),
        slots,
        jnp.full((batch, width), -1, jnp.int32),
        jnp.zeros((batch, width), jnp.float32),
    )
    _, slots, tokens, logprobs = jax.lax.while_loop(
        lambda carry: (carry[0].max() < steps) & jnp.any(carry[1].left > 0), step, start
    )
    return slots, tokens, logprobs


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
    logits = dense_matmul(hidden, model.head_weight()).astype(jnp.float32)
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


@partial(jax.jit, static_argnums=(1,))
def with_capacity(slots: Slots, capacity: int) -> Slots:
    """The same with room for longer texts."""
    text = slots.text
    if text is not None:
        text = jnp.pad(text, ((0, 0), (0, capacity - slots.cache.capacity)))
    return dataclasses.replace(slots, cache=grown(slots.cache, capacity), text=text)
