"""Prompts to continuations, all at once or as they come."""

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from fastjax.elsewhere import GENERATE, understood
from fastjax.errors import UserError, whole_number
from fastjax.generate.engine import STEPS, Completion, Engine, Request
from fastjax.generate.sampling import Sampling
from fastjax.generate.text import TextStream, stop_finder
from fastjax.models.llama import Llama

STREAMED_STEPS = 4  # tokens between two looks where someone waits for them
UNTOLD = {
    False: (0.0, 0),
    True: (1.0, 50),
}  # temperature and top_k where none is given; with do_sample transformers' own


def generate(model: Llama, prompts: Iterable[Sequence[int]] | Int[Array, "B S"], **options: Any) -> list[list[int]]:
    """Each prompt with its continuation, up to and including what ends it; options as for `complete`."""
    return [completion.prompt + completion.tokens for completion in complete(model, prompts, **options)]


def complete(
    model: Llama,
    prompts: Iterable[Sequence[int]] | Int[Array, "B S"],
    *,
    batch_size: int = 64,
    num_return_sequences: int = 1,
    kv_cache_dtype: str | None = None,
    prompt_lookup_num_tokens: int | None = None,
    attention_mask: Any = None,
    streamer: Any = None,
    adapters: Sequence[str | Path | None] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Completion]:
    """The completion of each prompt, `num_return_sequences` of each in a row; options as for `make_request`.

    At most `batch_size` run at a time; the next takes the place of the first that ends. Of several sequences of a prompt,
    the n-th has the seed + n. Keys and values are stored in the model's dtype, or in 8 bits with `kv_cache_dtype` "int8" or
    "float8_e4m3fn". `prompt_lookup_num_tokens` tries so many tokens at once that followed the last ones earlier in the text:
    the same text, sooner where it repeats itself. `attention_mask` is 0 at a prompt's padding, as tokenizers give it.
    `streamer`, such as transformers' TextStreamer, is given the tokens of a single prompt as they come. `adapters` names a
    PEFT adapter's directory for each prompt, or None for the model as it is, which carries no adapter itself then; all of
    them run in one batch. `progress` shows on a terminal how many texts are done, and tokens a second.
    """
    options = known_options(options, complete, "generate")
    rows = as_rows(prompts, attention_mask)
    if isinstance(adapters, str | Path):
        raise UserError(f"adapters= takes a list of a directory or None for each prompt, not {str(adapters)!r} alone.")
    if adapters is not None and len(adapters) != len(rows):
        raise UserError(f"adapters= names {len(adapters)} for {len(rows)} prompts: give each its own, or None.")
    if not rows:
        raise UserError("generate needs at least one prompt, and each must hold at least one token.")
    if whole_number(num_return_sequences, "num_return_sequences") < 1:
        raise UserError(f"{num_return_sequences=} must be at least 1.")
    seed = whole_number(options.pop("seed", 0), "seed")
    chosen = [None if each is None else str(each) for each in adapters or [None] * len(rows)]
    directories = sorted({each for each in chosen if each is not None})
    requests = [
        make_request(row, seed=seed + number, adapter=None if own is None else directories.index(own), **options)
        for row, own in zip(rows, chosen, strict=True)
        for number in range(num_return_sequences)
    ]
    if streamer is not None and len(requests) > 1:
        raise UserError(f"streamer= takes the tokens of one text, and there are {len(requests)}: give one prompt.")
    engine = Engine(model, batch_size, kv_cache_dtype, prompt_lookup_num_tokens, directories)
    states = engine.run(requests, STEPS) if streamer is None else told(engine.run(requests, STREAMED_STEPS), streamer)
    *_, completions = watched(states, len(requests), progress)
    return completions


def told(states: Iterator[list[Completion]], streamer: Any) -> Iterator[list[Completion]]:
    """The states of one completion, whose prompt and new tokens `streamer` is given as transformers gives them."""
    count = None
    for (completion,) in states:
        if count is None:
            streamer.put(np.asarray([completion.prompt]))
        for token in completion.tokens[count or 0 :]:
            streamer.put(np.asarray([token]))
        count = len(completion.tokens)
        yield [completion]
    streamer.end()


def watched(states: Iterator[list[Completion]], count: int, shown: bool) -> Iterator[list[Completion]]:
    """The states of so many completions, and on a terminal a line that says how far they are."""
    began = time.perf_counter()
    with tqdm(total=count, desc="generating", unit=" texts", leave=False, disable=None if shown else True) as bar:
        for completions in states:
            if not bar.disable:
                tokens = sum(len(completion.tokens) for completion in completions)
                bar.n = sum(completion.reason is not None for completion in completions)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tok/s")  # draws the line anew
            yield completions


def stream(
    model: Llama,
    prompt: Sequence[int],
    tokenizer: Any,
    *,
    stop_strings: Sequence[str] = (),
    kv_cache_dtype: str | None = None,
    prompt_lookup_num_tokens: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """The continuation of one prompt as text, in pieces as they come; stop strings end it and are left out."""
    options = known_options(options, stream, "stream")
    stop_strings = as_strings(stop_strings)
    request = make_request(prompt, tokenizer=tokenizer, stop_strings=stop_strings, **options)
    text = TextStream(tokenizer, stop_strings, request.prompt)
    engine = Engine(model, 1, kv_cache_dtype, prompt_lookup_num_tokens)
    for (completion,) in engine.run([request], STREAMED_STEPS):
        piece = text.piece(completion.tokens, last=completion.reason is not None)
        if piece:
            yield piece


def make_request(
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    do_sample: bool | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    adapter: int | None = None,
) -> Request:
    """A request with transformers' settings.

    Args:
        temperature: 0, as does none, takes the likeliest token; above 0 draws, the same for the same seed.
        do_sample: as transformers means it: False takes the likeliest token; True draws, at temperature 1 and from the 50
            likeliest tokens where no `temperature` or `top_k` says otherwise.
        top_k, top_p, min_p: which tokens are drawn from; 0, 1 and 0 leave none out.
        repetition_penalty: above 1 makes tokens less likely that the text has already, the prompt counted.
        eos_token_id: a token, or several, that end the text.
        stop_strings: a string, or several, that end the text; they need the `tokenizer`.
        adapter: which of the engine's adapters.
    """
    strings = as_strings(stop_strings)
    if strings and tokenizer is None:
        raise UserError("stop_strings need tokenizer=, which turns tokens into text.")
    if not all(strings):
        raise UserError("a stop string is empty, and every text holds that: leave it out.")
    if do_sample and temperature == 0:
        raise UserError(
            "do_sample=True draws, and temperature=0 does not: give a temperature above 0, or leave one out."
        )
    usual_temperature, usual_k = UNTOLD[bool(do_sample)]
    if temperature is None or do_sample is False:
        temperature = usual_temperature
    ids = [whole_number(token, "a token of a prompt") for token in prompt]
    return Request(
        prompt=ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, usual_k if top_k is None else top_k, top_p, min_p, repetition_penalty, seed),
        stops=as_stops(eos_token_id),
        finished=stop_finder(tokenizer, strings, ids) if strings else None,
        adapter=adapter,
    )


def known_options(options: Mapping[str, Any], function: Any, called: str) -> dict[str, Any]:
    """What of the options is meant for `function`, which hands them to make_request."""
    own, shared = (inspect.signature(each).parameters for each in (function, make_request))
    taken = {name for name in (*own, *shared) if name not in ("model", "prompt", "prompts", "adapter", "options")}
    return understood(options, taken, GENERATE, called)


def as_strings(strings: Any) -> list[str]:
    strings = [strings] if isinstance(strings, str) else list(strings)
    if strange := [string for string in strings if not isinstance(string, str)]:
        raise UserError(f"stop_strings must be a string or several, but {strange[0]!r} is none.")
    return strings


def as_stops(tokens: Any) -> frozenset[int]:
    if tokens is None:
        return frozenset()
    stops = [whole_number(token, "eos_token_id") for token in np.atleast_1d(tokens).tolist()]
    if strange := [token for token in stops if not -1 <= token < 1 << 31]:
        raise UserError(f"eos_token_id={strange[0]} is no token's number.")
    return frozenset(stops)


def as_rows(prompts: Any, attention_mask: Any = None) -> list[list[int]]:
    if prompts is None:
        raise UserError("generate takes a list of prompts, each a list of token ids, and was given None.")
    if isinstance(prompts, Mapping):
        raise UserError("generate takes what a tokenizer gives as keywords, generate(**encoding), or its input_ids.")
    if hasattr(prompts, "shape"):
        prompts = np.atleast_2d(np.asarray(prompts)).tolist()
    prompts = list(prompts)
    if any(isinstance(prompt, int | str) for prompt in prompts):
        raise UserError(
            "generate takes a list of prompts, each a list of token ids: [[1, 2, 3]], not [1, 2, 3] or text."
        )
    rows = [[whole_number(token, "a token of a prompt") for token in prompt] for prompt in prompts]
    if attention_mask is None:
        return rows
    masks = as_rows(attention_mask)
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise UserError("attention_mask must have a number for each token of each prompt.")
    return [[token for token, real in zip(*pair, strict=True) if real] for pair in zip(rows, masks, strict=True)]
