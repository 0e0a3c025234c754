"""Token ids and labels of each format, checked against the text they stand for, and what cannot be tokenised."""

import itertools
import random

import pytest
from tokenizers import processors

from fastjax.data import DataOptions, Report, tokenize_dataset, tokenize_record
from fastjax.data.examples import IGNORED
from fastjax.data.formats import Rendered
from fastjax.data.tokenize import encode
from fastjax.errors import UserError


def spoken(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def labelled(tokenizer, labels) -> str:
    """The labelled text, with `_` for every stretch that is not labelled."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    pieces = [spoken(tokenizer, run) for run in runs]
    return "_".join(piece for i, piece in enumerate(pieces) if piece or i in (0, len(pieces) - 1))


def test_text_is_wholly_labelled_and_closed(tokenizer):
    ids, labels = tokenize_record({"text": "a fox", "id": 7}, tokenizer)
    assert spoken(tokenizer, ids) == "<s>a fox</s>"
    assert labels == ids


@pytest.mark.parametrize("text", ["<s>a fox</s>", "<s>a fox", "a fox</s>"])
def test_special_tokens_in_the_text_are_not_doubled(tokenizer, text):
    assert tokenize_record({"text": text}, tokenizer) == tokenize_record({"text": "a fox"}, tokenizer)


def test_text_column_by_name(tokenizer):
    record = {"body": "a", "text": "b"}
    assert (
        spoken(tokenizer, tokenize_record(record, tokenizer, options=DataOptions(text_field="body"))[0]) == "<s>a</s>"
    )


def test_completion_is_labelled(tokenizer):
    record = {"prompt": "a ox", "completion": " fox"}
    ids, labels = tokenize_record(record, tokenizer)
    assert spoken(tokenizer, ids) == "<s>a ox fox</s>"
    assert labelled(tokenizer, labels) == "_ fox</s>"
    ids, labels = tokenize_record(record, tokenizer, options=DataOptions(completion_only_loss=False))
    assert labels == ids


def test_token_across_the_border_is_completion(tokenizer):
    # alone the prompt ends in " f"; with the completion " fox" is one token
    _, labels = tokenize_record({"prompt": "a f", "completion": "ox!"}, tokenizer)
    assert labelled(tokenizer, labels) == "_ fox!</s>"


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b fox"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "é"},
]


def test_messages_follow_the_template(tokenizer):
    ids, labels = tokenize_record({"messages": CHAT}, tokenizer)
    assert spoken(tokenizer, ids) == "<s>[user]a[assistant]b fox</s>[user]c[assistant]é</s>"
    assert labels == ids


def test_assistant_only_loss_labels_every_answer_and_nothing_else(tokenizer):
    ids, labels = tokenize_record({"messages": CHAT}, tokenizer, options=DataOptions(assistant_only_loss=True))
    assert ids == tokenize_record({"messages": CHAT}, tokenizer)[0]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    words = [spoken(tokenizer, [label]) if label != IGNORED else "_" for label in labels]
    assert "".join(words[: words.index("b")]).strip("_") == ""
    assert labelled(tokenizer, labels) == "_b fox</s>_é</s>"


def test_messages_of_a_hugging_face_dataset(tokenizer):
    datasets = pytest.importorskip("datasets")
    # columns of one type fill what a row leaves out with None, such as the tool calls of a message without any
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    dataset = datasets.Dataset.from_list([{"messages": [*CHAT, call]}, {"messages": CHAT}])
    ids, _ = tokenize_record(dataset[1], tokenizer)
    assert ids == tokenize_record({"messages": CHAT}, tokenizer)[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {},
            "row 3: no column to train on; expected 'text', 'messages', .* or 'instruction' and 'output', found no column",
        ),
        ({"txt": "a"}, "row 3: no column to train on; .* found 'txt'"),
        ({"prompt": "a"}, "row 3: column 'completion' is missing, found 'prompt'"),
        ({"completion": "a"}, "row 3: column 'prompt' is missing"),
        ({"text": 5}, r"row 3, column 'text': expected a string, found 5 \(int\)"),
        ({"text": None}, r"row 3, column 'text': expected a string, found None"),
        ({"text": ""}, "row 3, column 'text': the text is empty"),
        ({"prompt": ["a"], "completion": "b"}, r"row 3, column 'prompt': expected a string, found \['a'\] \(list\)"),
        ({"messages": "a"}, r"row 3, column 'messages': expected a list of messages .* found 'a' \(str\)"),
        ({"messages": []}, r"row 3, column 'messages': expected a list of messages"),
        ({"messages": ["a"]}, r"row 3, column 'messages', message 0: expected an object"),
        ({"messages": [{"role": "user"}]}, "message 0: expected a string as 'content', found no 'content'"),
        ({"messages": [{"role": 1, "content": "a"}]}, r"message 0: expected a string as 'role', found 1 \(int\)"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0: expected a string as 'content', found None"),
        ({"messages": [{"role": "cook", "content": "a"}]}, r"'messages': the chat template cannot .*unknown role cook"),
    ],
)
def test_faults_name_row_and_column(tokenizer, record, message):
    with pytest.raises(UserError, match=message):
        tokenize_record(record, tokenizer, where="row 3")


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="row 3, column 'messages': the tokenizer has no chat template"):
        tokenize_record({"messages": CHAT}, tokenizer, where="row 3")


def test_assistant_only_loss_needs_messages(tokenizer):
    with pytest.raises(UserError, match="row 3: assistant_only_loss=True needs a column 'messages', found 'text'"):
        tokenize_record({"text": "a"}, tokenizer, where="row 3", options=DataOptions(assistant_only_loss=True))


def test_no_label_left(tokenizer):
    with pytest.raises(UserError, match="row 3, column 'messages': it leaves no token to train on"):
        tokenize_record({"messages": CHAT[:1]}, tokenizer, where="row 3", options=DataOptions(assistant_only_loss=True))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 20, "completion": "b"}]
    with pytest.raises(UserError, match="row 1: no token to train on is left in the first 16 of its 23 tokens"):
        tokenize_dataset(rows, tokenizer, max_length=16)


def test_a_first_token_is_not_predicted(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UserError, match="row 3, column 'text': it leaves no token to train on"):
        tokenize_record({"text": "</s>"}, tokenizer, where="row 3")


def test_no_end_of_sequence_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="row 3: the tokenizer has no end-of-sequence token"):
        tokenize_record({"text": "a"}, tokenizer, where="row 3")


def lengths(tokenizer, rows, **options):
    examples = tokenize_dataset(rows, tokenizer, max_length=16, options=DataOptions(**options))
    assert {array.dtype.name for example in examples for array in example} == {"int32"}
    return examples.lengths.tolist(), examples.report


def test_what_becomes_of_long_examples(tokenizer):
    rows = [{"text": "a fox"}, {"text": "b" * 30}]
    assert lengths(tokenizer, rows) == ([4, 16], Report(records=2, cut=1))
    assert lengths(tokenizer, rows, overlong="split") == ([4, 16, 16], Report(records=2, split=1))
    fault = "row 1: its 32 tokens are more than max_length=16"
    assert lengths(tokenizer, rows, overlong="drop") == ([4], Report(records=2, dropped=(f"{fault}.",)))
    with pytest.raises(UserError, match=f"{fault}; raise max_length, or set overlong"):
        lengths(tokenizer, rows, overlong="error")


def test_a_part_with_nothing_to_learn_is_left_out(tokenizer):
    rows = [{"prompt": "a" * 20, "completion": "b" * 3}]
    examples = tokenize_dataset(rows, tokenizer, max_length=16, options=DataOptions(overlong="split"))
    assert [labelled(tokenizer, example.labels) for example in examples] == ["_bbb</s>"]


def test_bad_rows_may_be_left_out(tokenizer):
    rows = [{"text": "a"}, {"text": 5}, {"texts": "b"}, {"messages": CHAT[1:2] * 2}, {"text": "c"}]
    examples = tokenize_dataset(rows, tokenizer, max_length=16, options=DataOptions(bad_rows="drop"))
    assert [spoken(tokenizer, example.input_ids) for example in examples] == ["<s>a</s>", "<s>c</s>"]
    first, second, third = examples.report.dropped
    assert first.startswith("row 1, column 'text': expected a string, found 5")
    assert second.startswith("row 2: no column to train on")
    assert third.startswith("row 3, column 'messages', message 1: role 'assistant' comes after 'assistant'")
    tokenizer.eos_token = None  # no row's fault
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenize_dataset(rows, tokenizer, max_length=16, options=DataOptions(bad_rows="drop"))


def test_many_at_once_are_as_each_alone(tokenizer):
    rows = [{"text": "a fox"}, {"prompt": "a f", "completion": "ox é"}, {"messages": CHAT}, {"text": "é"}]
    options = DataOptions()
    together = tokenize_dataset(rows, tokenizer, max_length=99, options=options)
    for row, example in zip(rows, together, strict=True):
        ids, labels = tokenize_record(row, tokenizer, options=options)
        assert (example.input_ids.tolist(), example.labels.tolist()) == (ids, labels)


@pytest.mark.parametrize("trimmed", [False, True])
def test_learnt_tokens_are_those_that_hold_some_of_the_span(tokenizer, trimmed):
    """Against the bytes of each token, whatever the tokenizer says its offsets are."""
    if trimmed:  # as the tokenizers of GPT-2 and Llama 3 do: the space before a word is no part of its token's offsets
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    chance = random.Random(0)
    for _ in range(300):
        # not a space first: trimmed, a tokenizer says the same of one as of a token before the text
        text = "a" + "".join(
            chance.choices(["a", " ", "  ", " fox", "é", "ox", "\n", "f", "日"], k=chance.randint(2, 12))
        )
        start, stop = sorted(chance.sample(range(len(text) + 1), 2))
        rendered = Rendered(text, ((start, stop),), True, "text")
        ids, trained = encode([("row", rendered)], tokenizer)[0]
        sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]  # a character a byte
        ends = list(itertools.accumulate(sizes))
        first, last = len(text[:start].encode()), len(text[:stop].encode())
        expected = [end > first and end - size < last for end, size in zip(ends, sizes, strict=True)]
        assert trained.tolist() == expected, (text, start, stop)


def test_padding_with_the_end_token_hides_no_label(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    _, labels = tokenize_record({"prompt": "a", "completion": "b"}, tokenizer)
    assert labelled(tokenizer, labels) == "_b</s>"
