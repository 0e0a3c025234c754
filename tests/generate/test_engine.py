"""Generation with a cache is the whole model run anew for each token, whatever else runs beside it."""

import dataclasses
import io
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from fastjax.errors import UserError
from fastjax.generate import Engine, Sampling, complete, forward, generate, make_request, steps, stream
from fastjax.generate import engine as engine_module
from fastjax.generate.cache import bucket, empty_cache, storage_dtype
from fastjax.generate.forward import extend, next_logits, prepared_layers
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, init_weights
from fastjax.models.config import RopeConfig
from pallas_kernels import quantize_nf4
from pallas_kernels.low_rank import room_for
from tests.generate.tiny import CONFIG

CHANCE = np.random.default_rng(0)
PROMPTS = [CHANCE.integers(0, 97, size).tolist() for size in (5, 1, 60, 17, 64, 9)]


def make_model(kind: str = "plain") -> Llama:
    weights: dict[str, Any] = init_weights(CONFIG, jax.random.key(0))
    if kind == "packed":
        for name in weights:
            if name.endswith("proj.weight"):
                weights[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(quantize_nf4, weights[name]))
    model = Llama(CONFIG, weights, dtype=jnp.float32)
    if kind != "plain":
        add_lora(model, LoraConfig.create(r=4, lora_alpha=8))
        for index, module in enumerate(lora_modules(model).values()):
            module.b[...] = 0.2 * jax.random.normal(jax.random.key(index), module.b[...].shape)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model()


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    """Each prompt's continuation by 12 tokens, by itself, the whole text run anew for each token."""
    run, whole = jax.jit(lambda ids: model(ids)), []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(12):
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(text)] = text
            text.append(int(np.argmax(run(padded)[0, len(text) - 1])))
        whole.append(text)
    return whole


@pytest.mark.parametrize("kind", ["plain", "packed", "two launches"])
def test_logits_of_each_new_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths, extended by different numbers of tokens, against the whole texts at once."""
    calls = None
    if kind == "two launches":  # a layer's attention, and what comes between two of them
        kind, calls, own = "packed", [], forward.between_attentions
        monkeypatch.setattr(forward, "obstacle", lambda x, layers: None)
        monkeypatch.setattr(forward, "between_attentions", lambda *a: calls.append(1) or own(*a))
    model = make_model(kind)
    # as where one product takes an input and LoRA's product of it together: here of q/k/v and gate/up, not of o and down
    monkeypatch.setattr(forward, "room_beside", lambda x, group, columns: room_for(columns) if len(group) > 1 else 0)
    texts = jnp.asarray(CHANCE.integers(0, 97, (3, 24)), jnp.int32)
    whole = model(texts)
    cache, at = empty_cache(CONFIG, 3, 64, jnp.float32), np.zeros(3, np.int32)

    @partial(jax.jit, static_argnums=3)
    def run(cache, tokens, counts, first):
        hidden, cache = extend(model, prepared_layers(model), cache, tokens, counts, first=first)
        return next_logits(model, hidden, counts), cache

    for first, counts in [(True, [4, 9, 1]), (False, [1, 1, 1]), (False, [3, 0, 2]), (False, [1, 1, 0])]:
        width = max(counts)
        tokens = np.zeros((3, width), np.int32)
        for row, count in enumerate(counts):
            tokens[row, :count] = texts[row, at[row] : at[row] + count]
        logits, cache = run(cache, tokens, np.array(counts, np.int32), first)
        at += counts
        for row, count in enumerate(counts):
            if count:
                reference = whole[row, at[row] - 1]
                error = jnp.linalg.norm(logits[row] - reference) / jnp.linalg.norm(reference)
                assert float(error) < 1e-5, (row, counts)
    np.testing.assert_array_equal(cache.lengths, at)
    assert calls is None or calls


@pytest.mark.parametrize("batch_size", [2, 64])
def test_greedy_text_is_that_of_the_whole_model(model, greedy, batch_size) -> None:
    """Prompts up to and past a bucket's border, slots that others have left, groups of every size."""
    assert generate(model, PROMPTS, max_new_tokens=12, batch_size=batch_size) == greedy


def test_a_long_prompt_in_parts(model, greedy, monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PASS", 8 * 32)
    monkeypatch.setattr(engine_module, "LATER_PASS", 16)
    monkeypatch.setattr(forward, "LINES", 16)  # more are taken for a part of a prompt
    assert generate(model, PROMPTS, max_new_tokens=12) == greedy


@pytest.mark.parametrize(("stored", "bound"), [("int8", 0.015), ("float8_e4m3fn", 0.06)])
def test_8_bits_change_logits_little(model, greedy, stored, bound) -> None:
    """Logits of one token after another, each reading all before it as stored: 1.5 and 6 % of their norm on average,
    in a model of random weights, which damp nothing.
    """
    text = jnp.asarray([greedy[2]], jnp.int32)
    layers = prepared_layers(model)

    @jax.jit
    def logits(cache):
        def step(cache, token):
            hidden, cache = extend(model, layers, cache, token[None, None], jnp.ones(1, jnp.int32), first=False)
            return cache, next_logits(model, hidden, jnp.ones(1, jnp.int32))[0]

        return jax.lax.scan(step, cache, text[0])[1]

    exact = model(text)[0]
    got = logits(empty_cache(CONFIG, 1, 128, storage_dtype(stored, model.dtype)))
    error = jnp.linalg.norm(got - exact, axis=1) / jnp.linalg.norm(exact, axis=1)
    assert 1e-4 < float(error.mean()) < bound
    if stored == "int8":
        assert len(complete(model, PROMPTS[:1], max_new_tokens=4, kv_cache_dtype=stored)[0].tokens) == 4


def test_ends(model, greedy) -> None:
    """By a token, by the number of tokens, by the model's context."""
    stop = greedy[2][64]
    (ended,) = complete(model, [PROMPTS[2]], max_new_tokens=12, eos_token_id=[stop, 96])
    assert (ended.prompt + ended.tokens, ended.reason) == (greedy[2][: greedy[2].index(stop, 60) + 1], "stop")
    (short,) = complete(model, [PROMPTS[2]], max_new_tokens=3)
    assert (short.tokens, short.reason) == (greedy[2][60:63], "length")
    (full,) = complete(model, [list(range(90)) * 2 + list(range(70))], max_new_tokens=100)
    assert (len(full.tokens), full.reason) == (6, "length")


def test_an_end_is_any_number(model, greedy) -> None:
    stop = greedy[2][64]
    expected = greedy[2][: greedy[2].index(stop, 60) + 1]
    for ends in (stop, np.int32(stop), np.array([stop, 96])):
        assert generate(model, [PROMPTS[2]], max_new_tokens=12, eos_token_id=ends) == [expected]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_where_someone_looks(model, monkeypatch) -> None:
    for stderr, shown in ((Terminal(), ["1"]), (io.StringIO(), [])):
        monkeypatch.setattr("sys.stderr", stderr)
        complete(model, [PROMPTS[2]], max_new_tokens=12, progress=True)
        assert re.findall(r"(\d)/1 [^\r]*?, [1-9][\d,]* tok/s", stderr.getvalue())[-1:] == shown


def test_no_requests_are_nothing(model) -> None:
    assert list(Engine(model, 1).run([])) == []


def test_padding_stretches_no_positions() -> None:
    """Under dynamic RoPE, whose frequencies change past the context: a bucket may reach there, the text does not."""
    rope = RopeConfig(kind="dynamic", factor=4.0, original_max_position=48)
    config = dataclasses.replace(CONFIG, max_position_embeddings=48, rope=rope)
    model = Llama(config, init_weights(config, jax.random.key(0)), dtype=jnp.float32)
    text = generate(model, [PROMPTS[3]], max_new_tokens=12)[0]
    following = np.argmax(model(jnp.asarray([text]))[0], axis=-1)
    np.testing.assert_array_equal(text[17:], following[16:-1])


def test_log_probabilities_and_the_penalty_of_repetition(model) -> None:
    """Of the model as it is; and each token the likeliest once those of its own text, the prompt's too, are made less so, as
    transformers does: in a slot that another text has left.
    """
    penalise = RepetitionPenaltyLogitsProcessor(3.0)
    for done in complete(model, [PROMPTS[5], PROMPTS[0]], max_new_tokens=12, repetition_penalty=3.0, batch_size=1):
        text = done.prompt + done.tokens
        logits = model(jnp.asarray([text]))[0, len(done.prompt) - 1 : -1]
        log_p = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(12), jnp.asarray(done.tokens)]
        np.testing.assert_allclose(done.logprobs, log_p, rtol=1e-4, atol=1e-5)
        for at, row in enumerate(np.array(logits), start=len(done.prompt)):
            assert penalise(torch.tensor([text[:at]]), torch.tensor(row[None])).argmax() == text[at]


def test_a_seed_means_the_same_in_any_batch(model) -> None:
    draw = {"max_new_tokens": 10, "temperature": 1.5, "top_k": 40}
    alone = [complete(model, [prompt], seed=3, **draw)[0].tokens for prompt in PROMPTS[:2]]
    together = [done.tokens for done in complete(model, PROMPTS[:2], seed=3, **draw)]
    assert alone == together
    several = complete(model, PROMPTS[:2], seed=3, num_return_sequences=3, batch_size=2, **draw)
    assert several[0].tokens == alone[0]
    assert several[3].tokens == alone[1]
    assert len({tuple(done.tokens) for done in several}) == 6
    mixed = [
        make_request(PROMPTS[0], temperature=t, top_k=k, seed=3, max_new_tokens=10) for t, k in ((1.5, 40), (0, 0))
    ]
    *_, (sampled, likeliest) = Engine(model, 2).run(mixed)
    assert sampled.tokens == alone[0]
    assert likeliest.tokens == complete(model, PROMPTS[:1], max_new_tokens=10)[0].tokens


def test_draws_and_masks_are_those_of_transformers(model) -> None:
    """`do_sample` draws of the 50 likeliest at temperature 1, or takes the likeliest whatever else is said."""
    given = {"input_ids": np.array([[0, 0, 7, 8], [1, 2, 3, 4]]), "attention_mask": np.array([[0, 0, 1, 1], [1] * 4])}
    rows = [[7, 8], [1, 2, 3, 4]]
    texts = [
        generate(model, prompts, max_new_tokens=9, seed=3, **options)
        for prompts, options in (
            (rows, {}),
            (given["input_ids"], {"attention_mask": given["attention_mask"], "use_cache": True, "do_sample": None}),
            (rows, {"do_sample": False, "temperature": 0.7}),
            (rows, {"do_sample": True}),
            (rows, {"temperature": 1.0, "top_k": 50}),
            (rows, {"do_sample": True, "top_k": 0}),
        )
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != texts[3] == texts[4] != texts[5]


class Listener:
    """Notes what it is given, as transformers' streamers are."""

    def __init__(self) -> None:
        self.heard, self.ended = [], False

    def put(self, value: np.ndarray) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_given_each_token(model, greedy) -> None:
    listener = Listener()
    assert generate(model, [PROMPTS[2]], max_new_tokens=12, streamer=listener) == [greedy[2]]
    assert listener.heard == [[PROMPTS[2]], *([token] for token in greedy[2][60:])]
    assert listener.ended


def test_drafts_change_no_token(model) -> None:
    """Texts that repeat themselves and one that does not, greedy and drawn, in turns of two; ends by a token and by number.
    In fewer passes.
    """
    drawn = {"temperature": 0.7, "top_k": 2, "repetition_penalty": 0.9, "seed": 3}
    settings = [([7, 8, 9] * 4, {}), (PROMPTS[0], {}), ([7, 8, 9] * 4, drawn), ([5] * 9, {})]
    requests = [make_request(prompt, max_new_tokens=20, **options) for prompt, options in settings]
    *_, plain = Engine(model, 2).run(requests)
    requests[3] = make_request([5] * 9, max_new_tokens=20, eos_token_id=plain[3].tokens[12])
    passes = 0
    for drafted in Engine(model, 2, prompt_lookup_num_tokens=3).run(requests, steps=1):  # noqa: B007
        passes += 1
    end = plain[3].tokens.index(plain[3].tokens[12]) + 1
    assert [done.tokens for done in drafted] == [*(done.tokens for done in plain[:3]), plain[3].tokens[:end]]
    assert [done.reason for done in drafted] == ["length", "length", "length", "stop"]
    for mine, theirs in zip(drafted, plain, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs[: len(mine.tokens)], rtol=1e-3, atol=1e-4)
    assert passes < 20 + 20  # that many without drafts, two by two


def test_what_is_looked_up() -> None:
    """What followed the longest run of last tokens, where it stood latest; -1 where the text ends or nothing stood before."""
    texts = [[1, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3, 5, 1, 2, 3], [4, 6, 4, 6], [1, 2, 3], [4, 4, 4]]
    padded = np.zeros((4, 16), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    drafts, counts = steps.looked_up(jnp.asarray(padded), jnp.asarray([len(text) for text in texts], jnp.int32), 4)
    assert drafts.tolist() == [[8, 7, 2, 3], [4, 6, -1, -1], [-1] * 4, [4, -1, -1, -1]]
    assert counts.tolist() == [4, 2, 0, 1]


def test_programs_are_compiled_for_few_sizes(model, monkeypatch) -> None:
    """Not for each token, nor for each length within a bucket."""
    steps.decode.clear_cache()
    generate(model, [[1, 2, 3]], max_new_tokens=40)
    extended, decoded = steps.read_prompts._cache_size(), steps.decode._cache_size()
    for size, new in itertools.product((1, 7, 20), (2, 17, 28)):
        generate(model, [list(range(size))], max_new_tokens=new)
    assert steps.read_prompts._cache_size() == extended
    assert steps.decode._cache_size() == decoded
    generate(model, [list(range(20))], max_new_tokens=60)  # past the bucket's border: one more
    assert steps.decode._cache_size() == decoded + 1


def test_buckets() -> None:
    assert [bucket(size) for size in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "at least one prompt, and each must hold at least one token"),
        ([1, 2], {}, "takes a list of prompts, each a list of token ids"),
        (["text"], {}, "takes a list of prompts, each a list of token ids"),
        ([[1, 97]], {}, "token 97 of a prompt is none of the model's 97: use the tokenizer"),
        ([[-1]], {}, "token -1 of a prompt is none of the model's 97"),
        ([list(range(90)) * 3], {}, "a prompt of 270 tokens leaves no room in the model's context of 256: shorten it"),
        ([[1.5]], {}, "a token of a prompt must be a whole number, not 1.5"),
        (np.ones((1, 2, 3), int), {}, r"a token of a prompt must be a whole number, not \[1, 1, 1\]"),
        (None, {}, "takes a list of prompts, .* was given None"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        # of which two would be made, and the rest waited for
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ([[1]], {"num_return_sequences": 2.5}, "num_return_sequences must be a whole number"),
        ([[1]], {"batch_size": 1.5}, "batch_size must be a whole number, not 1.5"),
        ([[1]], {"prompt_lookup_num_tokens": 1.5}, "prompt_lookup_num_tokens must be a whole number"),
        ([[1]], {"top_p": None}, "top_p=None is not valid: it must be above 0"),
        ([[1]], {"top_k": 2.5}, "top_k=2.5 is not valid: it must be a whole number"),
        ([[1]], {"top_k": 1 << 31}, "top_k=2147483648 is not valid"),
        ([[1]], {"eos_token_id": "</s>"}, "eos_token_id must be a whole number, not '</s>'"),
        ([[1]], {"eos_token_id": 1 << 40}, "eos_token_id=1099511627776 is no token's number"),
        (
            [[1]],
            {"stop_strings": [7], "tokenizer": object()},
            "stop_strings must be a string or several, but 7 is none",
        ),
        ([[1]], {"adapters": "out"}, "adapters= takes a list of a directory or None for each prompt, not 'out' alone"),
        (
            [[1]],
            {"tempreature": 1.0},
            "Unknown key 'tempreature' in generate: did you mean 'temperature'",
        ),
        ([[1]], {"attention_mask": [[1, 1]]}, "attention_mask must have a number for each token"),
        ([[1]], {"do_sample": True, "temperature": 0}, "do_sample=True draws, and temperature=0 does not"),
        ([[1]], {"max_length": 9}, "generate takes no max_length: max_new_tokens counts what is added"),
        ([[1], [2]], {"streamer": io.StringIO()}, "streamer= takes the tokens of one text, and there are 2"),
        ({"input_ids": [[1]]}, {}, r"generate\(\*\*encoding\)"),
        ([[1]], {"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (
            [[1]],
            {"prompt_lookup_num_tokens": 0},
            "prompt_lookup_num_tokens=0 must be between 1 and 31, or None for none",
        ),
        (
            [[1]],
            {"kv_cache_dtype": "int4"},
            "kv_cache_dtype='int4' is not supported; use int8 or float8_e4m3fn, or None for the model's own, float32.",
        ),
        ([[1]], {"temperature": -1}, "temperature=-1 is not valid: it must be at least 0"),
        ([[1]], {"top_p": 0}, "top_p=0 is not valid: it must be above 0 and at most 1"),
        (
            [[1]],
            {"seed": 2**32 - 1, "num_return_sequences": 2},
            "seed=4294967296 is not valid: it must be a whole number, at least 0 and",
        ),
        ([[1]], {"stop_strings": ["a", ""], "tokenizer": object()}, "a stop string is empty"),
        ([[1]], {"stop_strings": "a"}, "stop_strings need tokenizer="),
    ],
)
def test_what_cannot_be_run(model, prompts, options, message) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **options)


def test_a_stream_is_the_text(model, tiny_tokenizer) -> None:
    """Also after one that Ctrl-C has ended in the middle."""
    (done,) = complete(model, [PROMPTS[0]], max_new_tokens=30)
    ended = stream(model, PROMPTS[0], tiny_tokenizer, max_new_tokens=30)
    next(ended)
    with pytest.raises(KeyboardInterrupt):
        ended.throw(KeyboardInterrupt)  # pyright: ignore[reportAttributeAccessIssue]
    pieces = list(stream(model, PROMPTS[0], tiny_tokenizer, max_new_tokens=30))
    assert len(pieces) > 3
    assert "".join(pieces) == tiny_tokenizer.decode(done.tokens, skip_special_tokens=True)


def test_stop_strings_end_a_text(model, tiny_tokenizer) -> None:
    (done,) = complete(model, [PROMPTS[0]], max_new_tokens=30)
    text = tiny_tokenizer.decode(done.tokens)
    stop = text[9:12]  # of three tokens
    at = text.index(stop)
    options = {"max_new_tokens": 30, "stop_strings": ["never", stop]}
    (stopped,) = complete(model, [PROMPTS[0]], tokenizer=tiny_tokenizer, **options)
    assert stopped.reason == "stop"
    assert tiny_tokenizer.decode(stopped.tokens) == text[: at + 3]
    assert "".join(stream(model, PROMPTS[0], tiny_tokenizer, **options)) == text[:at]


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="min_p=2 is not valid: it must be between 0 and 1"):
        Sampling(min_p=2)
