"""Each format of record as the text it becomes, with the learnt part in brackets."""

import pytest

from fastjax.data import DataOptions
from fastjax.data.formats import render
from fastjax.errors import UserError

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TWICE = [*CHAT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


def shown(record, tokenizer, **options) -> str:
    rendered = render(record, tokenizer, DataOptions(**options), "row 3")
    text, at = "", 0
    for start, stop in [(0, len(rendered.text))] if rendered.spans is None else rendered.spans:
        text += f"{rendered.text[at:start]}[{rendered.text[start:stop]}]"
        at = stop
    return text + rendered.text[at:]


@pytest.fixture
def plain(tokenizer):
    """A tokenizer whose template has no {% generation %} marks, as most have."""
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        ({"text": "a"}, {}, "[a]"),
        ({"text": "a", "messages": None}, {}, "[a]"),  # a table fills what a row lacks with None
        ({"prompt": "a", "completion": "b"}, {}, "a[b]"),
        ({"prompt": "a", "completion": "b"}, {"completion_only_loss": False}, "[ab]"),
        ({"messages": CHAT}, {}, "[<user>a;<assistant>b;]"),
        ({"messages": TWICE}, {"assistant_only_loss": True}, "<user>a;<assistant>[b;]<user>c;<assistant>[d;]"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"assistant_only_loss": True},
            "<user>a;<assistant>[b;]",
        ),
        ({"prompt": TWICE[:3], "completion": TWICE[3:]}, {}, "<user>a;<assistant>b;<user>c;<assistant>[d;]"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"completion_only_loss": False}, "[<user>a;<assistant>b;]"),
        ({"instruction": "a", "input": "x", "output": "b"}, {}, "<user>a\n\nx;<assistant>[b;]"),
        ({"instruction": "a", "input": "", "output": "b"}, {}, "<user>a;<assistant>[b;]"),
        ({"instruction": "a", "input": None, "output": "b"}, {}, "<user>a;<assistant>[b;]"),
    ],
)
def test_each_format(plain, record, options, expected):
    assert shown(record, plain, **options) == expected


def test_instructions_without_a_template(tokenizer):
    tokenizer.chat_template = None
    record = {"instruction": "a", "input": "x", "output": "b"}
    assert shown(record, tokenizer) == "### Instruction:\na\n\n### Input:\nx\n\n### Response:\n[b]"


def test_marks_of_the_template_go_first(tokenizer):
    options = {"assistant_only_loss": True, "response_part": "nowhere"}
    assert shown({"messages": TWICE}, tokenizer, **options) == "<s>[user]a[assistant][b</s>][user]c[assistant][d</s>]"


def test_words_that_introduce_the_turns(plain):
    parts = {"assistant_only_loss": True, "response_part": "<assistant>", "instruction_part": "<user>"}
    assert shown({"messages": TWICE}, plain, **parts) == "<user>a;<assistant>[b;]<user>c;<assistant>[d;]"
    text = {"text": "Q: a A: b Q: c A: d"}
    parts = {"response_part": "A:", "instruction_part": "Q:"}
    assert shown(text, plain, **parts) == "Q: a A:[ b ]Q: c A:[ d]"
    assert shown({"text": "A: b A: d"}, plain, response_part="A:") == "A:[ b A:][ d]".replace("A:][", "]A:[")
    with pytest.raises(UserError, match="row 3: response_part 'R:' does not occur in its text"):
        shown(text, plain, response_part="R:")


def test_a_template_that_rewrites_what_came_before(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN
    with pytest.raises(UserError, match="writes a conversation's beginning differently once it goes on"):
        shown({"messages": TWICE}, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*CHAT, CHAT[1]], "message 2: role 'assistant' comes after 'assistant'"),
        ([CHAT[0], CHAT[0]], "message 1: role 'user' comes after 'user'"),
        ([CHAT[0], {"role": "system", "content": "s"}], "message 1: role 'system' comes after 'user'"),
    ],
)
def test_roles_out_of_order(plain, messages, message):
    with pytest.raises(UserError, match=message):
        shown({"messages": messages}, plain)
