"""Records: what a data set is made of before it becomes tokens.

A record is a mapping from column to value, such as {"text": "..."} or {"messages": [...]}. Any sequence or iterable of
them serves as a data set, a `datasets.Dataset` included; JSON Lines files are read here. Records of a file remember their
line, so that an error found later, in tokenising, still names the place to look at.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjax.errors import UserError

type Record = Mapping[str, Any]


class FileRecords(Sequence[Record]):
    """The records of one file, and the line each came from."""

    def __init__(self, path: Path, records: list[Record], lines: list[int]) -> None:
        self.path = path
        self.records = records
        self.lines = lines

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index]}"


def load_records(path: str | Path) -> FileRecords:
    """Reads a JSON Lines file: one JSON object a line, in UTF-8; blank lines are passed over."""
    path = Path(path)
    records, lines = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):  # a byte order mark counts as blank
                    records.append(parse_line(line, f"{path}, line {number}"))
                    lines.append(number)
    except OSError as error:
        raise UserError(
            f"Data file {str(path)!r} cannot be read ({error.strerror}): give the path of a JSON Lines file."
        ) from error
    if not records:
        raise UserError(f"Data file {str(path)!r} holds no records: expected one JSON object a line.")
    return FileRecords(path, records, lines)


def parse_line(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error}); expected one JSON object a line.") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"text": "..."}}, found {describe(record)}.')
    return record


def iterate(dataset: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """(where, record) of every row; `where` begins an error about it: a file's line, else the row's number from 0."""
    where = getattr(dataset, "where", lambda index: f"row {index}")
    for index, record in enumerate(dataset):
        if not isinstance(record, Mapping):
            raise UserError(
                f'{where(index)}: expected a mapping of columns such as {{"text": "..."}}, found {describe(record)};'
                " a dictionary of splits is passed as one of them, dataset['train'], and a file through load_records(path)."
            )
        yield where(index), record


def describe(value: object) -> str:
    """A value as an error shows it: shortened, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
