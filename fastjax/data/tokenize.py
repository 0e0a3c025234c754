"""Text to token ids and labels.

Text and completions end with the tokenizer's end-of-sequence token, added where it is missing; a chat template writes its
own. A beginning-of-sequence token comes from the tokenizer, once, even where the text spells one out already. Labels are
unshifted as in HF: `labels[i]` is `input_ids[i]` where that token is to be predicted and -100 where it is not. As nothing
predicts the first token, its label does not count. A token is learnt if it holds any character that is to be.

Many texts go to the tokenizer at once: a fast one spreads them over the cores by itself, without processes of our own,
which JAX's threads would not survive being forked into.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastjax.data.cache import cached_examples
from fastjax.data.examples import IGNORED, Examples, Report
from fastjax.data.formats import Rendered, RowError, render
from fastjax.data.options import DataOptions
from fastjax.data.records import Record, iterate
from fastjax.errors import UserError

BATCH = 512  # records a call of the tokenizer


def tokenize_dataset(
    dataset: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    options: DataOptions | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Examples:
    """Tokenises every record; none of the examples is longer than `max_length`.

    With a `cache` directory, a data set that has a fingerprint is tokenised once.
    """
    options = options or DataOptions()

    def tokenize() -> Examples:
        total = len(dataset) if isinstance(dataset, Sized) else None
        parts = []
        with tqdm(total=total, desc="tokenising", leave=False, unit=" rows", disable=None if progress else True) as bar:
            for batch in batched(iterate(dataset)):
                parts.append(tokenize_batch(batch, tokenizer, max_length=max_length, options=options))
                bar.update(len(batch))
        return Examples.joined(parts)

    return cached_examples(cache, dataset, tokenizer, max_length, options, tokenize)


def batched(rows: Iterable[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    return map(list, itertools.batched(rows, BATCH))


def tokenize_batch(
    rows: Sequence[tuple[str, Record]], tokenizer: Any, *, max_length: int, options: DataOptions
) -> Examples:
    """The examples of some (where, record)."""
    if max_length < 2:
        raise UserError(f"{max_length=} must be at least 2: a token to predict needs one before it.")
    report, dropped, rendered = Report(records=len(rows)), [], []
    for where, record in rows:
        try:
            rendered.append((where, render(record, tokenizer, options, where)))
        except RowError as error:
            if options.bad_rows == "error":
                raise
            dropped.append(str(error))
    examples = []
    for (where, text), (ids, trained) in zip(rendered, encode(rendered, tokenizer), strict=True):
        try:
            parts, change = fit(ids, trained, max_length, options, where, text.column)
        except RowError as error:
            if options.bad_rows == "error":
                raise
            dropped.append(str(error))
            continue
        examples += parts
        report += change
    return Examples.of(examples, report + Report(dropped=tuple(dropped)))


def tokenize_record(
    record: Record, tokenizer: Any, *, where: str = "record", options: DataOptions | None = None
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one record at its full length; `where` names it in errors."""
    text = render(record, tokenizer, options or DataOptions(), where)
    ids, trained = encode([(where, text)], tokenizer)[0]
    check_target(trained, where, text.column)
    return ids.tolist(), np.where(trained, ids, IGNORED).tolist()


def encode(rendered: Sequence[tuple[str, Rendered]], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, which of them are learnt) of each text."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for closed in (False, True):
        places = [place for place, (_, text) in enumerate(rendered) if text.closed == closed]
        if not places:
            continue
        texts = [rendered[place][1] for place in places]
        if any(text.spans is not None for text in texts) and not tokenizer.is_fast:
            raise UserError(
                "to learn a part of each text, fastjax needs a fast tokenizer, which knows where its tokens lie: load it"
                " with use_fast=True, or set completion_only_loss and assistant_only_loss to False."
            )
        out = tokenizer(
            [text.text for text in texts],
            add_special_tokens=not closed,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a long row is cut to max_length and counted, not warned about
        )
        for number, (place, text, ids) in enumerate(zip(places, texts, out["input_ids"], strict=True)):
            trained = np.full(len(ids), text.spans is None)
            for span in text.spans or ():
                trained[tokens_of(span, out.encodings[number])] = True
            ids = np.array(ids, np.int32)
            found[place] = (ids, trained) if closed else with_ends(ids, trained, text, tokenizer, rendered[place][0])
    return [found[place] for place in range(len(rendered))]


def tokens_of(span: tuple[int, int], encoding: Any) -> slice:
    """The tokens that hold a character of `span`.

    A tokenizer may leave the space before a word out of what it says the word's token holds, and say of a token of spaces
    that it holds nothing: so a token is taken to begin where the one before it ends, or earlier if it says so itself, as
    tokens do that are parts of one character.
    """
    start, stop = span
    first, end = 0, len(encoding)
    while first < end and encoding.token_to_chars(first) is None:  # special tokens around the text hold none of it
        first += 1
    while first < end and encoding.token_to_chars(end - 1) is None:
        end -= 1
    after = lambda token: encoding.token_to_chars(token)[1]  # noqa: E731
    begin = bisect.bisect_right(range(first, end), start, key=after) + first
    last = bisect.bisect_right(range(first, end), stop, key=after) + first
    if last < end:
        before = after(last - 1) if last > first else 0
        last += min(encoding.token_to_chars(last)[0], before) < stop
    return slice(begin, last)


def with_ends(
    ids: np.ndarray, trained: np.ndarray, text: Rendered, tokenizer: Any, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """One beginning-of-sequence token, if any, and an end-of-sequence token, learnt if the text is to its end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"{where}: the tokenizer has no end-of-sequence token to end texts with; set tokenizer.eos_token."
        )
    if bos is not None and ids[:2].tolist() == [bos, bos]:
        ids, trained = ids[1:], trained[1:]
    if ids[-1:].tolist() != [eos]:
        ids, trained = np.append(ids, np.int32(eos)), np.append(trained, False)
    trained[-1] = text.spans is None or (bool(text.spans) and text.spans[-1][1] == len(text.text))
    return ids, trained


def fit(
    ids: np.ndarray, trained: np.ndarray, max_length: int, options: DataOptions, where: str, column: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Report]:
    """The example, or what `options.overlong` makes of one longer than `max_length`."""
    check_target(trained, where, column)
    if len(ids) <= max_length:
        return [(ids, trained)], Report()
    if options.overlong in ("drop", "error"):
        fault = f"{where}: its {len(ids)} tokens are more than max_length={max_length}"
        if options.overlong == "error":
            raise UserError(f"{fault}; raise max_length, or set overlong to truncate, split or drop.")
        return [], Report(dropped=(f"{fault}.",))
    if options.overlong == "split":
        starts = range(0, len(ids), max_length)
        parts = [(ids[start : start + max_length], trained[start : start + max_length]) for start in starts]
        return [(part, mask) for part, mask in parts if mask[1:].any()], Report(split=1)
    if not trained[1:max_length].any():
        raise RowError(
            f"{where}: no token to train on is left in the first {max_length} of its {len(ids)} tokens;"
            " raise max_length or remove the row."
        )
    return [(ids[:max_length], trained[:max_length])], Report(cut=1)


def check_target(trained: np.ndarray, where: str, column: str) -> None:
    if not trained[1:].any():
        raise RowError(f"{where}, column {column!r}: it leaves no token to train on; correct or remove the row.")
