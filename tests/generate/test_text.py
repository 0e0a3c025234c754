"""Text that is shown while it is made."""

import itertools

import numpy as np
import pytest

from fastjax.generate.text import TextStream, stop_finder


class Letters:
    """A tokenizer whose tokens are the given pieces of bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, tokens, skip_special_tokens=False, **_) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def shown(tokenizer: Letters, **options) -> list[str]:
    stream = TextStream(tokenizer, **options)
    count = len(tokenizer.pieces)
    return [stream.piece(range(size), last=size == count) for size in range(1, count + 1)]


def test_half_a_character_waits_for_the_other_half() -> None:
    assert shown(Letters(b"a", b"\xc3", b"\xa9", b"b")) == ["a", "", "é", "b"]
    assert shown(Letters(b"a", b"\xc3")) == ["a", "�"]  # nothing more comes: it is what it is


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"Hi", b" <e", b"nd", b">", b" more"], "Hi "),
        ([b"Hi", b" <e", b"nt"], "Hi <ent"),
        ([b"Hi <", b"<end>"], "Hi <"),
        ([b"Hi <e"], "Hi <e"),
    ],
)
def test_a_stop_string_is_never_shown_nor_its_beginning(pieces, expected) -> None:
    assert "".join(shown(Letters(*pieces), stop_strings=["<end>"])) == expected


def test_the_token_that_completes_a_stop_string_is_the_last() -> None:
    find = stop_finder(Letters(b"a", b"<", b"end", b">b", b"c"), ["<end>", "zz"])
    assert find([0, 1, 2]) is None
    assert find([0, 1, 2, 3]) == 4
    assert find([0, 1, 2, 3, 4, 4, 4]) == 4


class Counting(Letters):
    """One that notes how many tokens it decodes at a time."""

    def decode(self, tokens, **_) -> str:
        vars(self).setdefault("decoded", []).append(len(tokens))
        return super().decode(tokens)


def test_a_stop_string_is_found_in_few_tokens_however_many_there_are() -> None:
    """Looked for after each few tokens as in all of them, in text that is cut within characters."""
    chance = np.random.default_rng(0)
    for trial in range(60):
        text = "".join(chance.choice(list("abé€ "), 60)).encode()
        cuts = range(1, len(text)) if trial % 2 else sorted(chance.choice(np.arange(1, len(text)), 30, replace=False))
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        tokenizer = Counting(*pieces)
        strings = ["".join(chance.choice(list("abé€ "), 3)) for _ in range(2)]
        counts, size = range(1, len(pieces) + 1), 1 + trial % 5
        texts = {count: Letters.decode(tokenizer, range(count)) for count in counts}
        expected = next((count for count in counts if any(string in texts[count] for string in strings)), None)
        find, found = stop_finder(tokenizer, strings), None
        for start in range(0, len(pieces), size):
            found = find(list(range(min(len(pieces), start + size))), start)
            if found is not None:
                break
        assert found == expected
        assert (
            max(tokenizer.decoded) <= 5 + 9 + 8 + 1
        )  # new ones, as many as a string's bytes, spare ones, and the one before


class Words:
    """A tokenizer whose decoder drops the space in front of a text, as SentencePiece's does; token 0 is special."""

    words = ("<s>", " Once", " upon", "ly", " time")

    def decode(self, tokens, skip_special_tokens=False, **_) -> str:
        return "".join(self.words[token] for token in tokens if token or not skip_special_tokens).removeprefix(" ")


@pytest.mark.parametrize(
    ("before", "tokens", "expected"),
    [([0, 1], [2, 4], " upon time"), ([0, 1], [3, 4], "ly time"), ([0], [1, 2], "Once upon"), ([], [1], "Once")],
)
def test_a_word_does_not_run_into_the_prompt(before, tokens, expected) -> None:
    stream = TextStream(Words(), before=before)
    assert stream.piece(tokens[:1], last=False) + stream.piece(tokens, last=True) == expected


class Tidy(Letters):
    """One that takes spaces before punctuation away, unless it is told not to."""

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=True) -> str:
        text = super().decode(tokens)
        return text.replace(" '", "'").replace(" !", "!") if clean_up_tokenization_spaces else text


def test_spaces_once_shown_are_not_taken_back() -> None:
    assert "".join(shown(Tidy(b"x =", b" ", b"'so", b" ", b"!"))) == "x = 'so !"


def test_a_stop_string_may_begin_with_the_space_after_the_prompt() -> None:
    assert stop_finder(Words(), [" upon"], [1])([2, 4]) == 1


def test_half_a_character_in_the_prompt_hides_nothing() -> None:
    tokenizer = Letters(b"a\xc3", b"\xa9b")
    assert TextStream(tokenizer, before=[0]).piece([1], last=True) == "�b"
