"""Prompts to continuations, all at once or as they come."""

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from fastjax.errors import UserError, check_keys, whole_number
from fastjax.generate.engine import STEPS, Completion, Engine, Request
from fastjax.generate.sampling import Sampling
from fastjax.generate.text import TextStream, stop_finder
from fastjax.models.llama import Llama

STREAMED_STEPS = 4  # tokens between two looks where someone waits for them
ELSEWHERE = {  # what other libraries' generate takes, and what does the same here
    "attention_mask": "give each prompt as a list of its own tokens, without padding; they may differ in length",
    "do_sample": "a temperature above 0 draws, 0 takes the likeliest token",
    "max_length": "max_new_tokens counts what is added to the prompt",
    "use_cache": "keys and values are always kept",
}


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
    adapters: Sequence[str | Path | None] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Completion]:
    """The completion of each prompt, `num_return_sequences` of each in a row; options as for `make_request`.

    At most `batch_size` run at a time; the next takes the place of the first that ends. Of several sequences of a prompt,
    the n-th has the seed + n. Keys and values are stored in the model's dtype, or in 8 bits with `kv_cache_dtype` "int8" or
    "float8_e4m3fn". `prompt_lookup_num_tokens` tries so many tokens at once that followed the last ones earlier in the text:
    the same text, sooner where it repeats itself. `adapters` names a PEFT adapter's directory for each prompt, or None for
    the model as it is, which carries no adapter itself then; all of them run in one batch. `progress` shows on a terminal
    how many texts are done, and tokens a second.
    """
    check_options(options, complete, "generate")
    rows = as_rows(prompts)
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
    engine = Engine(model, batch_size, kv_cache_dtype, prompt_lookup_num_tokens, directories)
    *_, completions = watched(engine.run(requests, STEPS), len(requests), progress)
    return completions


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
    check_options(options, stream, "stream")
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
    temperature: float = 0.0,
    top_k: int = 0,
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
        temperature: 0 takes the likeliest token; above 0 draws, the same for the same seed.
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
    ids = [whole_number(token, "a token of a prompt") for token in prompt]
    return Request(
        prompt=ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stops=as_stops(eos_token_id),
        finished=stop_finder(tokenizer, strings, ids) if strings else None,
        adapter=adapter,
    )


def check_options(options: Mapping[str, Any], function: Any, called: str) -> None:
    """Refuses what `function`, which hands them to make_request, knows nothing of."""
    for name in ELSEWHERE.keys() & options.keys():
        raise UserError(f"{called} takes no {name}: {ELSEWHERE[name]}; leave it out.")
    own, shared = (inspect.signature(each).parameters for each in (function, make_request))
    taken = {name for name in (*own, *shared) if name not in ("model", "prompt", "prompts", "adapter", "options")}
    check_keys(options, taken, f"the options of {called}")


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


def as_rows(prompts: Any) -> list[list[int]]:
    if prompts is None:
        raise UserError("generate takes a list of prompts, each a list of token ids, and was given None.")
    if hasattr(prompts, "shape"):
        prompts = np.atleast_2d(np.asarray(prompts)).tolist()
    prompts = list(prompts)
    if any(isinstance(prompt, int | str) for prompt in prompts):
        raise UserError(
            "generate takes a list of prompts, each a list of token ids: [[1, 2, 3]], not [1, 2, 3] or text."
        )
    return [[whole_number(token, "a token of a prompt") for token in prompt] for prompt in prompts]
