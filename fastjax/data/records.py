"""Records: what a data set is made of before it becomes tokens.

A record is a mapping from column to value, such as {"text": "..."} or {"messages": [...]}. Any sequence or iterable of
them serves as a data set, those of Hugging Face `datasets` included; `load_records` reads files and the hub. Records of
a file remember their line, so that an error found later, in tokenising, still names the place to look at.
"""

import hashlib
import itertools
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjax.errors import UserError

type Record = Mapping[str, Any]

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark counts as blank
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, *READERS)
KINDS = ".jsonl, .json, .csv, .tsv, .parquet or .txt"


class JsonLines(Sequence[Record]):
    """The records of a JSON Lines file, each parsed anew when asked for: a large file stays on disk."""

    def __init__(self, path: Path) -> None:
        """Goes through the file once, so that a broken line is found before anything else is done."""
        self.path = path
        self.places: list[tuple[int, int, int]] = []  # of each record: first byte, bytes, line
        digest = hashlib.sha256()
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip(BLANK):
                    parse_line(line, f"{path}, line {number}")
                    self.places.append((start, len(line), number))
                start += len(line)
            # a file without a byte cannot be mapped
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.places else b""
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, size, _ = self.places[index]
        return parse_line(self._content[start : start + size], self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.places[index][2]}"


class Unread(Sequence[Record]):
    """Stands for a data set with a length in a process that does not read it, as another one does."""

    def __len__(self) -> int:
        raise RuntimeError("the first process reads this data set, and no other")

    def __getitem__(self, index):
        len(self)


class StreamedJsonLines(Iterable[Record]):
    """The records of a JSON Lines file as they come, for one that is too large to go through first."""

    def __init__(self, path: Path, skipped: int = 0) -> None:
        self.path = path
        self.skipped = skipped

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip(BLANK))
            for number, line in itertools.islice(lines, self.skipped, None):
                yield parse_line(line, f"{self.path}, line {number}")

    def skip(self, records: int) -> "StreamedJsonLines":
        """The same without its first `records`, which are not parsed."""
        return StreamedJsonLines(self.path, self.skipped + records)

    def where(self, index: int) -> str:
        return f"{self.path}, row {self.skipped + index}"


class NamedRecords(Sequence[Record]):
    """Records with a name for errors."""

    def __init__(self, records: Any, name: str, fingerprint: str | None = None) -> None:
        self.records = records
        self.name = name
        self.fingerprint = fingerprint or getattr(records, "_fingerprint", None)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"


def load_records(
    source: str | Path, split: str = "train", *, name: str | None = None, streaming: bool = False
) -> Iterable[Record]:
    """The records of a local file, or of a data set on the Hugging Face hub or saved by `datasets`.

    Files are JSON Lines, a JSON array, CSV, TSV, Parquet, or text with a record {"text": line} a line. `split` and
    `name` (a hub data set's configuration) go to `datasets`. With `streaming` nothing is read ahead.
    """
    path = Path(source)
    if path.is_dir():
        return _saved(path, split)
    if path.suffix not in SUFFIXES and not path.exists():
        return _through_datasets(str(source), f"Data set {str(source)!r}", streaming, name=name, split=split)
    try:
        path.open("rb").close()
        if path.suffix == ".json" and path.read_bytes()[:64].strip(BLANK).startswith(b"["):
            records = _json_array(path)
        elif path.suffix in READERS:
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            what = f"Data file {str(path)!r}"
            records = _through_datasets(
                READERS[path.suffix], what, streaming, data_files=str(path), split="train", **options
            )
        elif path.suffix in JSON_SUFFIXES:
            records = StreamedJsonLines(path) if streaming else JsonLines(path)
        else:
            raise UserError(f"Data file {str(path)!r} is of no known kind: expected {KINDS}.")
    except OSError as error:
        raise UserError(
            f"Data file {str(path)!r} cannot be read ({error.strerror}): give the path of a {KINDS} file,"
            " or the name of a data set on the hub."
        ) from error
    if isinstance(records, Sequence) and not records:
        raise UserError(f"Data file {str(path)!r} holds no records: expected one JSON object a line.")
    return records


def _json_array(path: Path) -> NamedRecords:
    content = path.read_bytes()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: malformed JSON ({error}); expected an array of objects.") from error
    return NamedRecords(records, str(path), hashlib.sha256(content).hexdigest())


def _saved(path: Path, split: str) -> Iterable[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Data directory {str(path)!r} cannot be read ({_first_line(error)}): give a file, or what"
            " Dataset.save_to_disk wrote."
        ) from error
    if isinstance(saved, Mapping):
        if split not in saved:
            raise UserError(f"Data set {str(path)!r} has no split {split!r}; it has {', '.join(map(str, saved))}.")
        saved = saved[split]
    return NamedRecords(saved, str(path))


def _through_datasets(builder: str, what: str, streaming: bool, **options: Any) -> Iterable[Record]:
    import datasets

    try:
        records = datasets.load_dataset(builder, streaming=streaming, **options)
    except Exception as error:  # builders raise many kinds for a bad file, name or connection
        raise UserError(
            f"{what} cannot be loaded ({_first_line(error)}): give the path of a {KINDS} file, or the name of a data"
            " set on the hub."
        ) from error
    return records if streaming else NamedRecords(records, str(options.get("data_files", builder)))


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def parse_line(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: malformed JSON ({reason}); expected one JSON object a line.") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"text": "..."}}, found {describe(record)}.')
    return record


def iterate(dataset: Iterable[Record], start: int = 0) -> Iterator[tuple[str, Record]]:
    """(where, record) of every row from `start` on; `where` begins an error about it: a file's line, else "row 7"."""
    where = getattr(dataset, "where", lambda index: f"row {index}")
    for index, record in enumerate(skipped(dataset, start) if start else dataset):
        if not isinstance(record, Mapping):
            raise UserError(
                f'{where(start + index)}: expected a mapping of columns such as {{"text": "..."}}, found'
                f" {describe(record)}; a dictionary of splits is passed as one of them, dataset['train'], and a file"
                " through load_records(path)."
            )
        yield where(start + index), record


def skipped(dataset: Iterable[Record], count: int) -> Iterable[Record]:
    """`dataset` without its first `count` records, by its own `skip` where it has one."""
    return dataset.skip(count) if hasattr(dataset, "skip") else itertools.islice(dataset, count, None)  # pyright: ignore[reportAttributeAccessIssue]


def describe(value: object) -> str:
    """A value as an error shows it: shortened, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
