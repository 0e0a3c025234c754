"""Tokens to text while they come: stop strings, and no half of a character."""

from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "�"  # what a decoder writes for the bytes of a character that is not whole


def stop_finder(tokenizer: Any, strings: Sequence[str]) -> Callable[[list[int]], int | None]:
    """A function of the new tokens: how many of them stand once one of `strings` is in their text, else None.

    The token that completes the string is the last that stands, wherever within it the string ends.
    """

    def find(tokens: list[int]) -> int | None:
        text = tokenizer.decode(tokens)
        if not any(string in text for string in strings):
            return None
        low, high = 1, len(tokens)  # the fewest tokens whose text has it
        while low < high:
            middle = (low + high) // 2
            found = any(string in tokenizer.decode(tokens[:middle]) for string in strings)
            low, high = (low, middle) if found else (middle + 1, high)
        return low

    return find


class TextStream:
    """The text of growing tokens, a piece at a time; nothing is shown that later tokens could change or cut off."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.shown = ""

    def piece(self, tokens: Sequence[int], *, last: bool) -> str:
        """What the tokens so far add to what was shown. `last`: no more will come."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
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
