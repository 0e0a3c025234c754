"""Tokens to text while they come: stop strings, and no half of a character."""

from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "�"  # what a decoder writes for the bytes of a character that is not whole
SPARE = 8  # tokens that have no text, where a stop string lies across them


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], **options: Any) -> str:
    """The text that `tokens` add to that of `before`, of which the last token is enough.

    Decoders that write a space in front of each word drop it from a text's first: decoded by themselves, the tokens would
    run into the word before.
    """
    options["clean_up_tokenization_spaces"] = False  # it would take back spaces that were shown already
    last = list(before[-1:])
    start = tokenizer.decode(last, **options)
    if start.endswith(UNFINISHED):  # half a character, which the tokens may make whole
        return tokenizer.decode(list(tokens), **options)
    return tokenizer.decode([*last, *tokens], **options)[len(start) :]


def stop_finder(
    tokenizer: Any, strings: Sequence[str], before: Sequence[int] = ()
) -> Callable[[list[int], int], int | None]:
    """A function of the new tokens, `before` them the prompt, and of how many of them hold none of `strings`: how many stand
    once one is in their text, else None.

    The token that completes the string is the last that stands, wherever within it the string ends. A string lies in no
    more tokens than it has bytes, so the text of a few before the latest is enough, however long it has become.
    """
    reach = max((len(string.encode()) for string in strings), default=0) + SPARE

    def find(tokens: list[int], searched: int = 0) -> int | None:
        begin = max(0, searched - reach)
        context = tokens[begin - 1 : begin] if begin else before

        def held_by(count: int) -> bool:
            text = text_after(tokenizer, context, tokens[begin:count])
            return any(string in text for string in strings)

        if not held_by(len(tokens)):
            return None
        low, high = begin + 1, len(tokens)  # the fewest tokens whose text has it
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if held_by(middle) else (middle + 1, high)
        return low

    return find


class TextStream:
    """The text of growing tokens after those `before`, a piece at a time; nothing is shown that later tokens could change
    or cut off.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.before = before
        self.stop_strings = tuple(stop_strings)
        self.shown = ""

    def piece(self, tokens: Sequence[int], *, last: bool) -> str:
        """What the tokens so far add to what was shown. `last`: no more will come."""
        text = text_after(self.tokenizer, self.before, tokens, skip_special_tokens=True)
        ends = [at for string in self.stop_strings if (at := text.find(string)) >= 0]
        if ends:
            text = text[: min(ends)]
        elif not last:
            text = text.rstrip(UNFINISHED)
            held = max((_overlap(text, string) for string in self.stop_strings), default=0)
            text = text[: len(text) - held]
        new = text[len(self.shown) :]
        self.shown += new
        return new


def _overlap(text: str, string: str) -> int:
    """The longest end of `text` that `string` begins with."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)
