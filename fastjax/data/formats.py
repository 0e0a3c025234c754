"""Records to text, and which of its characters are to be learnt. Formats are told apart by their columns:

    {"messages": [{"role", "content"}]}          through the tokenizer's chat template; ShareGPT's "conversations" with
                                                 "from" and "value" are the same
    {"prompt", "completion"}                     two strings, or two lists of messages
    {"text"}                                     the column's name is `text_field`
    {"instruction", "input"?, "output"}          as a question and its answer: messages where the tokenizer has a chat
                                                 template, headed paragraphs where it has none

All of a text or conversation is learnt. Of prompt and completion, and instruction and output, the completion is, unless
`completion_only_loss` is off. With `assistant_only_loss` it is the assistant's words alone, found by the first that
applies: the {% generation %} marks of the chat template; the words that introduce a turn, where `response_part` and
`instruction_part` name them; what each answer adds to the conversation before it, which needs a template whose text only
ever grows.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from fastjax.data.options import DataOptions
from fastjax.data.records import Record, describe
from fastjax.errors import UserError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}

type Spans = tuple[tuple[int, int], ...]


class RowError(UserError):
    """What is wrong with one record. The others may be right, so it can be left out and the run go on."""


class Rendered(NamedTuple):
    """A record as text. `spans` are the characters to be learnt, None for all of them.

    `closed`: a chat template has written the text's special tokens, none are to be added. `column` names it in errors.
    """

    text: str
    spans: Spans | None
    closed: bool
    column: str


def render(record: Record, tokenizer: Any, options: DataOptions, where: str) -> Rendered:
    """The text of one record; `where` names it in errors."""
    present = {name: value for name, value in record.items() if value is not None}
    if "prompt" not in present and ("messages" in present or "conversations" in present):
        column = "messages" if "messages" in present else "conversations"
        messages = checked_messages(present[column], f"{where}, column {column!r}")
        return render_messages(messages, tokenizer, options, where, column)
    if options.response_part and options.text_field in present:
        text = nonempty(record, options.text_field, where)
        return Rendered(text, marked_spans(text, options, where), False, options.text_field)
    if options.assistant_only_loss:
        raise UserError(
            f"{where}: assistant_only_loss=True needs a column 'messages', found {columns(record)};"
            " set it to False or give conversations."
        )
    if "prompt" in present or "completion" in present:
        return render_completion(record, tokenizer, options, where)
    if options.text_field in record:
        return Rendered(nonempty(record, options.text_field, where), None, False, options.text_field)
    if "instruction" in present or "output" in present:
        return render_instruction(record, tokenizer, options, where)
    raise RowError(
        f"{where}: no column to train on; expected {options.text_field!r}, 'messages', 'prompt' and 'completion', or"
        f" 'instruction' and 'output', found {columns(record)} (dataset_text_field names the text column)."
    )


def render_completion(record: Record, tokenizer: Any, options: DataOptions, where: str) -> Rendered:
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        prompt, completion = (
            checked_messages(record[name], f"{where}, column {name!r}") for name in ("prompt", "completion")
        )
        return render_turns(prompt, completion, tokenizer, options, where, "completion")
    prompt, completion = text_of(record, "prompt", where), text_of(record, "completion", where)
    return join(prompt, completion, options, "completion")


def render_instruction(record: Record, tokenizer: Any, options: DataOptions, where: str) -> Rendered:
    instruction, output = nonempty(record, "instruction", where), nonempty(record, "output", where)
    extra = text_of(record, "input", where) if record.get("input") is not None else ""
    if tokenizer.chat_template:
        question = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
        answer = {"role": "assistant", "content": output}
        return render_turns([question], [answer], tokenizer, options, where, "output")
    parts = [("Instruction", instruction), *([("Input", extra)] if extra else []), ("Response", "")]
    return join("\n\n".join(f"### {title}:\n{text}" for title, text in parts), output, options, "output")


def join(prompt: str, completion: str, options: DataOptions, column: str) -> Rendered:
    text = prompt + completion
    return Rendered(text, ((len(prompt), len(text)),) if options.completion_only_loss else None, False, column)


def render_turns(
    prompt: list[dict], completion: list[dict], tokenizer: Any, options: DataOptions, where: str, column: str
) -> Rendered:
    where = f"{where}, column {column!r}"
    text = apply_template(tokenizer, [*prompt, *completion], where)
    if not options.completion_only_loss:
        return Rendered(text, None, True, column)
    start = prefix_length(tokenizer, text, prompt, where)
    return Rendered(text, ((start, len(text)),), True, column)


def render_messages(messages: list[dict], tokenizer: Any, options: DataOptions, where: str, column: str) -> Rendered:
    where = f"{where}, column {column!r}"
    if not options.assistant_only_loss:
        return Rendered(apply_template(tokenizer, messages, where), None, True, column)
    if tokenizer.chat_template and GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        text, spans = generation_spans(tokenizer, messages, where)
        return Rendered(text, spans, True, column)
    text = apply_template(tokenizer, messages, where)
    if options.response_part:
        return Rendered(text, marked_spans(text, options, where), True, column)
    return Rendered(text, answer_spans(tokenizer, text, messages, where), True, column)


def generation_spans(tokenizer: Any, messages: list[dict], where: str) -> tuple[str, Spans]:
    """The text, and what the template has marked with {% generation %}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered() -> Any:
        return render_jinja_template(
            [messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )

    texts, spans = _rendering(rendered, where)
    return texts[0], tuple((start, stop) for start, stop in spans[0])


def answer_spans(tokenizer: Any, text: str, messages: list[dict], where: str) -> Spans:
    """What each of the assistant's turns adds to the text of the messages before it."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = prefix_length(tokenizer, text, messages[:index], where)
            whole = apply_template(tokenizer, messages[: index + 1], where)
            stop = len(whole) if text.startswith(whole) else _no_prefix(where)
            spans.append((start, stop))
    return tuple(spans)


def prefix_length(tokenizer: Any, text: str, messages: list[dict], where: str) -> int:
    """Characters of `text` that come before the answer to its first `messages`."""
    prompt = apply_template(tokenizer, messages, where, add_generation_prompt=True)
    return len(prompt) if text.startswith(prompt) else _no_prefix(where)


def _no_prefix(where: str) -> int:
    raise UserError(
        f"{where}: the chat template writes a conversation's beginning differently once it goes on, so what the"
        " assistant says cannot be told from it; mark it with {% generation %} in tokenizer.chat_template, or name what"
        " introduces the turns with instruction_part and response_part."
    )


def marked_spans(text: str, options: DataOptions, where: str) -> Spans:
    """From each `response_part` to the next `instruction_part`."""
    response, instruction = options.response_part or "", options.instruction_part or ""
    spans, start = [], text.find(response)
    while start >= 0:
        start += len(response)
        stop = text.find(instruction, start) if instruction else -1
        stop = len(text) if stop < 0 else stop
        # without an instruction part, and where answers follow each other, one ends where the next is introduced
        following = text.find(response, start)
        spans.append((start, min(stop, following) if following >= 0 else stop))
        start = following
    if not spans:
        raise RowError(f"{where}: response_part {response!r} does not occur in its text; correct it or remove the row.")
    return tuple(spans)


def apply_template(tokenizer: Any, messages: list[dict], where: str, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; set tokenizer.chat_template or give text.")
    return _rendering(
        lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt),
        where,
    )


def _rendering(rendered: Any, where: str) -> Any:
    try:
        return rendered()
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RowError(f"{where}: the chat template cannot render it ({error}); correct or remove the row.") from error


def columns(record: Record) -> str:
    return ", ".join(repr(name) for name in record) or "no column"


def text_of(record: Record, column: str, where: str) -> str:
    if column not in record:
        raise RowError(f"{where}: column {column!r} is missing, found {columns(record)}.")
    value = record[column]
    if not isinstance(value, str):
        raise RowError(f"{where}, column {column!r}: expected a string, found {describe(value)}.")
    return value


def nonempty(record: Record, column: str, where: str) -> str:
    text = text_of(record, column, where)
    if not text:
        raise RowError(f"{where}, column {column!r}: the text is empty; remove the row.")
    return text


def checked_messages(messages: Any, where: str) -> list[dict]:
    """`messages` as {"role", "content", ...}, without the keys that a table fills with None; raises if they are not.

    Content may be absent beside tool calls. A system message comes first, and neither user nor assistant speaks twice in
    a row: a template would pass over that without a word.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError(f"{where}: expected a list of messages with 'role' and 'content', found {describe(messages)}.")
    checked = [checked_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]
    for number, (before, message) in enumerate(itertools.pairwise(checked), start=1):
        role = message["role"]
        if role == "system" or (role == before["role"] and role in ("user", "assistant")):
            raise RowError(
                f"{where}, message {number}: role {role!r} comes after {before['role']!r}; a system message comes first,"
                " and user and assistant take turns."
            )
    return checked


def checked_message(message: Any, where: str) -> dict:
    if not isinstance(message, Mapping):
        raise RowError(f"{where}: expected an object with 'role' and 'content', found {describe(message)}.")
    if "from" in message and "value" in message:
        role = SHAREGPT_ROLES.get(message["from"], message["from"])
        message = {"role": role, "content": message["value"]}
    for key in ("role", "content"):
        value = message.get(key)
        absent = value is None and key == "content" and message.get("tool_calls")
        if not isinstance(value, str) and not absent:
            found = describe(value) if key in message else f"no {key!r}"
            raise RowError(f"{where}: expected a string as {key!r}, found {found}.")
    return {key: value for key, value in message.items() if value is not None or key == "content"}
