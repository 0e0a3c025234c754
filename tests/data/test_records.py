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
    with pytest.raises(UserError, match=r"Data directory .* cannot be read .* what Dataset\.save_to_disk wrote"):
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", '[{"text": "a"}, {"text": "b"}]'),
        ("data.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("data.csv", "text\na\nb\n"),
        ("data.tsv", "text\tn\na\t1\nb\t2\n"),
        ("data.txt", "a\nb\n"),
        ("data.parquet", None),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_kinds_of_file(tmp_path, monkeypatch, name, content, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / name
    if content is None:
        datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_parquet(str(path))
    else:
        path.write_text(content)
    rows = [record for _, record in iterate(load_records(path, streaming=streaming))]
    assert [row["text"] for row in rows] == ["a", "b"]


def test_errors_of_other_kinds_of_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"data\.parquet' cannot be loaded"):
        load_records(tmp_path / "data.parquet")
    (tmp_path / "data.json").write_text('[{"text": "a"},')
    with pytest.raises(UserError, match=r"data\.json: malformed JSON"):
        load_records(tmp_path / "data.json")
    (tmp_path / "data.yaml").write_text("text: a")
    with pytest.raises(UserError, match=r"data\.yaml' is of no known kind: expected \.jsonl"):
        load_records(tmp_path / "data.yaml")


def test_a_saved_data_set_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "saved"))
    assert [where for where, _ in iterate(load_records(tmp_path / "saved", "test"))] == [f"{tmp_path / 'saved'}, row 0"]
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        load_records(tmp_path / "saved", "dev")


def test_a_data_set_on_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = load_records("org/texts", "test", name="en")
    assert [where for where, _ in iterate(records)] == ["org/texts, row 0"]
    assert asked == [("org/texts", {"streaming": False, "name": "en", "split": "test"})]

    def refuse(path, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"Data set 'org/texts' cannot be loaded .*Couldn't reach the Hub"):
        load_records("org/texts")
