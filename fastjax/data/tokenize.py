"""Records to token ids and labels.

Three formats, told apart by their columns, with the meaning TRL gives them:

    {"prompt": str, "completion": str}   loss on the completion (`completion_only_loss`) or on all of it
    {"messages": [{"role", "content"}]}  through the tokenizer's chat template; loss on all of it, or on the tokens inside
                                         the template's {% generation %} blocks (`assistant_only_loss`)
    {"text": str}                        loss on all of it; the column's name is `text_field`

Text and completions end with the tokenizer's end-of-sequence token, added where it is missing; a chat template writes its
own. A beginning-of-sequence token comes from the tokenizer, once, even where the text spells one out already. Labels are
unshifted as in HF: `labels[i]` is `input_ids[i]` where that token is to be predicted and -100 where it is not. As nothing
predicts the first token, its label does not count.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any, NamedTuple

import jinja2
import numpy as np
from tqdm import tqdm

from fastjax.data.records import Record, describe, iterate
from fastjax.errors import UserError

IGNORED = -100
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    """One tokenised record: int32 arrays of one length."""

    input_ids: np.ndarray
    labels: np.ndarray


def tokenize_dataset(
    dataset: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    text_field: str = "text",
    completion_only_loss: bool = True,
    assistant_only_loss: bool = False,
    progress: bool = False,
) -> list[Example]:
    """Tokenises every record. One that has nothing to train on in its first `max_length` tokens is an error."""
    examples = []
    total = len(dataset) if isinstance(dataset, Sized) else None
    for where, record in tqdm(iterate(dataset), "tokenising", total, leave=False, unit=" rows", disable=not progress):
        input_ids, labels = tokenize_record(
            record,
            tokenizer,
            where=where,
            text_field=text_field,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
        if not has_target(labels[:max_length]):
            raise UserError(
                f"{where}: no token to train on is left in the first {max_length} of its {len(input_ids)} tokens;"
                " raise max_length or remove the row."
            )
        examples.append(Example(np.array(input_ids, np.int32), np.array(labels, np.int32)))
    return examples


def tokenize_record(
    record: Record,
    tokenizer: Any,
    *,
    where: str = "record",
    text_field: str = "text",
    completion_only_loss: bool = True,
    assistant_only_loss: bool = False,
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one record; `where` names it in errors."""
    if "messages" in record and "prompt" not in record:
        column = "messages"
        input_ids, labels = tokenize_messages(record, tokenizer, where, assistant_only_loss)
    elif assistant_only_loss:
        raise UserError(
            f"{where}: assistant_only_loss=True needs a column 'messages', found {columns(record)};"
            " set it to False or give conversations."
        )
    elif "prompt" in record or "completion" in record:
        column = "completion"
        input_ids, labels = tokenize_completion(record, tokenizer, where, completion_only_loss)
    elif text_field in record:
        column = text_field
        input_ids = close(encode(tokenizer, nonempty(record, text_field, where)), tokenizer, where)
        labels = list(input_ids)
    else:
        raise UserError(
            f"{where}: no column to train on; expected {text_field!r}, 'messages', or 'prompt' and 'completion',"
            f" found {columns(record)} (dataset_text_field names the text column)."
        )
    if not has_target(labels):
        raise UserError(f"{where}, column {column!r}: it leaves no token to train on; correct or remove the row.")
    return input_ids, labels


def tokenize_messages(record: Record, tokenizer: Any, where: str, assistant_only: bool) -> tuple[list[int], list[int]]:
    where = f"{where}, column 'messages'"
    messages = record["messages"]
    check_messages(messages, where)
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; set tokenizer.chat_template or give text.")
    if assistant_only and not GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        raise UserError(
            "assistant_only_loss=True needs a chat template that marks the assistant's words with {% generation %},"
            " and this tokenizer's does not; add the marks to tokenizer.chat_template or set assistant_only_loss=False."
        )
    try:
        out = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            return_dict=True,
            return_assistant_tokens_mask=assistant_only,
            tokenizer_kwargs={"verbose": False},  # a long row is cut to max_length and counted, not warned about
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: the chat template cannot render it ({error}); correct or remove the row.") from error
    input_ids = list(out["input_ids"])
    if not assistant_only:
        return input_ids, list(input_ids)
    return input_ids, [
        token if marked else IGNORED for token, marked in zip(input_ids, out["assistant_masks"], strict=True)
    ]


def tokenize_completion(
    record: Record, tokenizer: Any, where: str, completion_only: bool
) -> tuple[list[int], list[int]]:
    """Prompt and completion are tokenised as the one text they are.

    The prompt ends where that text's tokens part from the prompt's own, so a token merged across the border counts as
    completion: it holds some of it.
    """
    prompt, completion = text_of(record, "prompt", where), text_of(record, "completion", where)
    input_ids = close(encode(tokenizer, prompt + completion), tokenizer, where)
    if not completion_only:
        return input_ids, list(input_ids)
    pairs = zip(encode(tokenizer, prompt), input_ids, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return input_ids, [IGNORED] * shared + input_ids[shared:]


def encode(tokenizer: Any, text: str) -> list[int]:
    input_ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    doubled = bos is not None and input_ids[:2] == [bos, bos]
    return input_ids[doubled:]


def close(input_ids: list[int], tokenizer: Any, where: str) -> list[int]:
    """`input_ids` with the end-of-sequence token at its end."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"{where}: the tokenizer has no end-of-sequence token to end texts with; set tokenizer.eos_token."
        )
    return input_ids if input_ids[-1:] == [eos] else [*input_ids, eos]


def has_target(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def columns(record: Record) -> str:
    return ", ".join(repr(name) for name in record) or "no column"


def text_of(record: Record, column: str, where: str) -> str:
    if column not in record:
        raise UserError(f"{where}: column {column!r} is missing, found {columns(record)}.")
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"{where}, column {column!r}: expected a string, found {describe(value)}.")
    return value


def nonempty(record: Record, column: str, where: str) -> str:
    text = text_of(record, column, where)
    if not text:
        raise UserError(f"{where}, column {column!r}: the text is empty; remove the row.")
    return text


def check_messages(messages: Any, where: str) -> None:
    """Raises unless `messages` is a list of {"role": str, "content": str}; content may be absent beside tool calls."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: expected a list of messages with 'role' and 'content', found {describe(messages)}.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}, message {number}: expected an object with 'role' and 'content', found {describe(message)}."
            )
        for key in ("role", "content"):
            value = message.get(key)
            absent = value is None and key == "content" and message.get("tool_calls")
            if not isinstance(value, str) and not absent:
                found = describe(value) if key in message else f"no {key!r}"
                raise UserError(f"{where}, message {number}: expected a string as {key!r}, found {found}.")
