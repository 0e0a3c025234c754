"""Reading JSON Lines, and saying where something is wrong."""

import pytest

from fastjax.data import load_records
from fastjax.data.records import iterate
from fastjax.errors import UserError


def write(tmp_path, content: bytes | str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_objects_past_blank_lines_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  {"text": "b\\u2028\xc3\xa9"}\n\n')
    records = load_records(path)
    assert list(records) == [{"text": "a"}, {"text": "b\u2028é"}]
    assert [where for where, _ in iterate(records)] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": }\n', r"data\.jsonl, line 3: malformed JSON .*column 10"),
        ('{"text": "a"} {"text": "b"}\n', r"line 1: malformed JSON \(Extra data"),
        ('{"text": "a"}\n["a"]\n', r"line 2: expected a JSON object .* found \['a'\] \(list\)"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: byte 11 of the line is not UTF-8"),
        ("[" * 100_000, r"line 1: malformed JSON"),
        ("\n \n", r"data\.jsonl' holds no records"),
    ],
)
def test_faults_name_file_and_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_records(write(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl' cannot be read \(No such file"):
        load_records(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        load_records(tmp_path)


def test_any_iterable_of_mappings():
    assert list(iterate({"text": word} for word in "ab")) == [("row 0", {"text": "a"}), ("row 1", {"text": "b"})]


@pytest.mark.parametrize("dataset", [[{"text": "a"}, "b"], {"train": [{"text": "a"}]}, "data.jsonl"])
def test_rows_that_are_no_mappings(dataset):
    with pytest.raises(UserError, match=r"row \d: expected a mapping of columns .* found '.+' \(str\)"):
        list(iterate(dataset))


def test_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    assert [record for _, record in iterate(datasets.Dataset.from_list(rows))] == rows
