"""Requests to completions: slots of a batch that requests pass through, with the loop over tokens on the device.

A request waits until a slot is free; its prompt is run, in a group with others that wait, and its keys and values are put
into the slot. Then all slots step together, some tokens at a time: that many are made on the device before the host looks at
them, to hand them on, to find stop strings, and to fill slots that have become free.

Where the model lies on a mesh, so do the slots: each device that has rows of its own has as many (layout.py).
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastjax.errors import UserError, whole_number
from fastjax.generate.adapters import row_columns, with_adapters
from fastjax.generate.cache import SMALLEST, KVCache, bucket, empty_cache, storage_dtype
from fastjax.generate.layout import Layout
from fastjax.generate.sampling import RowSampling, Sampling
from fastjax.generate.steps import Slots, admit, decode, read_prompts, stopped, with_capacity
from fastjax.models.config import LlamaConfig
from fastjax.models.llama import Llama

STEPS = 16  # tokens a row makes between two looks of the host
FIRST_PASS = 16384  # tokens of all prompts that are run at once at first, attending to each other alone
LATER_PASS = 2048  # tokens of each prompt that are run at once after that, attending to the cache too
MOST_DRAFTS = 31  # tried in a pass
GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. `finished` looks at the new tokens, of which it has seen so many before, and
    says how many of them stand, once the text has come to an end that is no token: a stop string.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stops: frozenset[int] = frozenset()
    finished: Callable[[list[int], int], int | None] | None = None
    adapter: int | None = None  # which of the engine's; None for the model as it is


@dataclasses.dataclass
class Completion:
    """What a request has come to so far; `reason` is "stop" or "length" once it is at its end."""

    prompt: list[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of each token, before any setting of sampling
    reason: str | None = None


class Engine:
    """Runs requests on a model, `batch_size` at most at the same time; on a mesh, at least one on each device with rows.

    Args:
        kv_cache_dtype: how keys and values are stored: "int8", "float8_e4m3fn", or None for the model's own dtype.
        prompt_lookup_num_tokens: how many tokens a pass tries that are looked up in the text so far; None for no more than
            the next one. The text is the same, sooner where it repeats itself; in 16 bits a tie may fall the other way, as
            with any other number of rows.
        adapters: directories of PEFT adapters, of which each request names its own by number; the model carries none.
    """

    def __init__(
        self,
        model: Llama,
        batch_size: int,
        kv_cache_dtype: str | None = None,
        prompt_lookup_num_tokens: int | None = None,
        adapters: Sequence[str | Path] = (),
    ) -> None:
        if whole_number(batch_size, "batch_size") < 1:
            raise UserError(f"{batch_size=} must be at least 1.")
        self.drafts = checked_drafts(prompt_lookup_num_tokens, model.config)
        self.config = model.config
        self.model_dtype = model.dtype
        self.stored = storage_dtype(kv_cache_dtype, model.dtype)
        self.batch_size = batch_size
        self.adapters, self.columns = len(adapters), 0
        if adapters:
            model, self.columns = with_adapters(model, adapters)
        self.layout, self.parameters = Layout.of(model)

    def run(self, requests: Sequence[Request], steps: int = STEPS) -> Iterator[list[Completion]]:
        """All completions, as far as they are, after every `steps` tokens; they are the same objects each time."""
        if not requests:
            return
        for request in requests:
            check_request(request, self.config)
            if request.adapter is not None and not 0 <= request.adapter < self.adapters:
                raise UserError(f"a request's adapter={request.adapter} is none of the engine's {self.adapters}.")
        completions = [Completion(list(request.prompt)) for request in requests]
        waiting = deque(range(len(requests)))
        # the request in each slot; batches of few sizes, as many for each device
        shares = self.layout.row_shares
        rows: list[int | None] = [None] * (-(-min(self.batch_size, power_of_two(len(requests))) // shares) * shares)
        longest = max(len(request.prompt) for request in requests[: len(rows)])
        slots = self.empty_slots(
            len(rows), max(len(request.stops) for request in requests), self._capacity(longest, steps)
        )
        while waiting or any(row is not None for row in rows):
            slots = self._fill(slots, rows, waiting, requests)
            slots = self._with_room(slots, rows, requests, completions, steps)
            sampling = [GREEDY if row is None else requests[row].sampling for row in rows]
            slots, tokens, logprobs = self.decode(slots, sampling, steps)
            ended = self._collect(rows, requests, completions, np.asarray(tokens), np.asarray(logprobs))
            if ended.any():
                slots = stopped(self.layout, slots, ended)
            yield completions

    def decode(
        self, slots: Slots, sampling: Sequence[Sampling], steps: int
    ) -> tuple[Slots, Int[Array, "B steps"], Float[Array, "B steps"]]:
        """As many tokens more of each row, where they fit in the cache; `slots` are gone."""
        return decode(self.layout, self.parameters, slots, RowSampling.of(sampling), steps, self.drafts)

    def _limit(self, request: Request) -> int:
        """Tokens that the request may make: what it asks for, within the model's context."""
        return min(request.max_new_tokens, self.config.max_position_embeddings - len(request.prompt))

    def empty_slots(self, batch: int, stops: int, capacity: int = SMALLEST) -> Slots:
        """Rows that rest, with room for so many tokens that end a text."""
        vocab = self.config.vocab_size

        def like() -> Slots:
            numbers = jnp.zeros(batch, jnp.int32)
            return Slots(
                empty_cache(self.config, batch, capacity, self.stored),
                jnp.zeros((batch, vocab), jnp.float32),
                jnp.zeros((batch, vocab), bool),
                numbers,
                numbers,
                jnp.zeros((batch, max(1, stops)), jnp.int32),
                jnp.zeros((batch, capacity), jnp.int32) if self.drafts else None,
                jnp.zeros((batch, self.adapters * self.columns), jnp.float32) if self.adapters else None,
            )

        slots = self.layout.zeros(like)
        return dataclasses.replace(slots, stops=slots.stops - 1)  # no token is that

    def _fill(self, slots: Slots, rows: list, waiting: deque[int], requests: Sequence[Request]) -> Slots:
        """Puts waiting requests into free slots, as one group, of which each device has those of its own slots."""
        lines = self._lines(rows, len(waiting))
        size, share = len(lines), len(rows) // self.layout.row_shares
        if not size:
            return slots
        for slot in lines:
            if slot is not None:
                rows[slot] = waiting.popleft()
        group = [Request([0]) if slot is None else requests[rows[slot]] for slot in lines]
        own = None
        if self.adapters:
            own = row_columns([request.adapter for request in group], self.adapters, self.columns)
        cache, logits = self._prefill([request.prompt for request in group], own)
        seen = np.zeros((size, self.config.vocab_size), bool)
        stops = np.full((size, slots.stops.shape[1]), -1, np.int32)
        for line, request in enumerate(group):
            seen[line, np.asarray(request.prompt)] = True
            stops[line, : len(request.stops)] = sorted(request.stops)
        places = np.array([share if slot is None else slot % share for slot in lines], np.int32)
        left = np.array([self._limit(request) for request in group], np.int32)
        if cache.capacity > slots.cache.capacity:
            slots = with_capacity(self.layout, slots, cache.capacity)
        text = None if slots.text is None else self._rows_of([request.prompt for request in group], cache.capacity)
        return admit(self.layout, slots, places, cache, logits, seen, left, stops, text, own)

    def _lines(self, rows: list, count: int) -> list[int | None]:
        """Free slots for so many requests, as many of each device's, which None makes equal and a power of two."""
        share = len(rows) // self.layout.row_shares
        free = [slot for slot, row in enumerate(rows) if row is None]
        chosen = sorted(free, key=lambda slot: (slot % share, slot))[:count]  # one of each device's, then another
        of_devices = [[slot for slot in chosen if slot // share == device] for device in range(self.layout.row_shares)]
        size = max(map(len, of_devices))
        return [slot for own in of_devices for slot in (*own, *[None] * ((size and power_of_two(size)) - len(own)))]

    def _prefill(self, prompts: Sequence[Sequence[int]], own: np.ndarray | None) -> tuple[KVCache, jax.Array]:
        """The cache of some prompts, and the logits after each."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = bucket(int(lengths.max()))
        tokens = self._rows_of(prompts, width)
        cache = self.layout.zeros(lambda: empty_cache(self.config, len(prompts), width, self.stored))
        logits = None
        at_once = len(prompts) // self.layout.row_shares  # by each device
        first = min(width, max(LATER_PASS, FIRST_PASS // at_once))
        for start in (0, *range(first, width, LATER_PASS)):
            size = LATER_PASS if start else first
            counts = np.clip(lengths - start, 0, size)
            part = tokens[:, start : start + size]
            logits, cache = read_prompts(self.layout, self.parameters, cache, part, counts, start == 0, own, logits)
        assert logits is not None
        return cache, logits

    def _capacity(self, held: int, steps: int) -> int:
        """For rows that hold so many positions, and are to make so many more."""
        # of a pass with drafts, all are put into the cache, whether they stand or not
        return bucket(held + steps + 2 * self.drafts)

    @staticmethod
    def _rows_of(prompts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        tokens = np.zeros((len(prompts), width), np.int32)
        for line, prompt in enumerate(prompts):
            tokens[line, : len(prompt)] = prompt
        return tokens

    def _with_room(
        self, slots: Slots, rows: list, requests: Sequence[Request], completions: list[Completion], steps: int
    ) -> Slots:
        """A cache that the next steps fit in."""
        held = [len(requests[row].prompt) + len(completions[row].tokens) for row in rows if row is not None]
        wanted = self._capacity(max(held), steps)
        if wanted <= slots.cache.capacity:
            return slots
        return with_capacity(self.layout, slots, wanted)

    def _collect(
        self, rows: list, requests: Sequence[Request], completions: list[Completion], tokens: np.ndarray, logprobs: Any
    ) -> Bool[np.ndarray, "B"]:
        """Hands new tokens to their completions and frees slots at their end; -> those that do not know of it, as a text
        alone ended there.
        """
        ended = np.zeros(len(rows), bool)
        for slot, row in enumerate(rows):
            if row is None:
                continue
            completion, request = completions[row], requests[row]
            count = int((tokens[slot] >= 0).sum())
            completion.tokens += tokens[slot, :count].tolist()
            completion.logprobs += logprobs[slot, :count].tolist()
            before = len(completion.tokens) - count
            stands = request.finished(completion.tokens, before) if request.finished else None
            if stands is not None:
                del completion.tokens[stands:], completion.logprobs[stands:]
                completion.reason = "stop"
            elif completion.tokens[-1:] and completion.tokens[-1] in request.stops:
                completion.reason = "stop"
            elif len(completion.tokens) >= self._limit(request):
                completion.reason = "length"
            if completion.reason:
                rows[slot] = None
            ended[slot] = stands is not None
        return ended


def power_of_two(count: int) -> int:
    """`count` rounded up to one."""
    return 1 << (count - 1).bit_length()


def checked_drafts(count: int | None, config: LlamaConfig) -> int:
    if count is None:
        return 0
    if not 1 <= whole_number(count, "prompt_lookup_num_tokens") <= MOST_DRAFTS:
        raise UserError(f"prompt_lookup_num_tokens={count} must be between 1 and {MOST_DRAFTS}, or None for none.")
    if config.rope.kind == "dynamic":
        raise UserError(
            "prompt_lookup_num_tokens cannot be used with this model's dynamic RoPE scaling, under which tokens that are "
            "only tried change those before them: leave it out."
        )
    return count


def check_request(request: Request, config: LlamaConfig) -> None:
    longest, vocab = config.max_position_embeddings, config.vocab_size
    if not len(request.prompt):
        raise UserError("generate needs at least one prompt, and each must hold at least one token.")
    # of 2.5 tokens the device makes two, and the host would wait for the rest forever
    if whole_number(request.max_new_tokens, "max_new_tokens") < 1:
        raise UserError(f"max_new_tokens={request.max_new_tokens} must be at least 1.")
    if len(request.prompt) >= longest:
        raise UserError(
            f"a prompt of {len(request.prompt)} tokens leaves no room in the model's context of {longest}: shorten it."
        )
    strange = next((token for token in request.prompt if not 0 <= token < vocab), None)
    if strange is not None:
        raise UserError(
            f"token {strange} of a prompt is none of the model's {vocab}: use the tokenizer that the model came with."
        )
