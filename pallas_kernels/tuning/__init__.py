"""What was measured to be fastest: a table of choices per kind of device, a JSON file each beside this one.

An op asks for its choice by name and shape, and gives the default that runs where nothing was measured:

    tiles = choice("dequantize_nf4", Tiles(blocks=128, warps=4))

The table's entry is built as the default's class, frozen dataclasses that check themselves. `python -m pallas_kernels.tune`
writes the file of the device it runs on. On a GPU without one, defaults run, and a line in the log says how to tune.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.dispatch import cuda_capability, device_kind
from pallas_kernels.triton_call import OLDEST

FOLDER = Path(__file__).parent
LOG = logging.getLogger("pallas_kernels")
Key = tuple[str, frozenset[tuple[str, int | str]]]

_tried: dict[Key, Any] = {}  # what the tuner has every op choose for the time being


def choice[Choice](op: str, default: Choice, **shape: int | str) -> Choice:
    """What was measured for this op and shape on the default device, of the default's class; or the default."""
    key = (op, frozenset(shape.items()))
    if key in _tried:
        return _tried[key]
    kind = device_kind() if (cuda_capability() or (0, 0)) >= OLDEST else None
    fields = None if kind is None else _table(kind).get(key)
    return default if fields is None else build(type(default), fields, f"{path_of(kind or '')}: {op} {shape}")


def build[Choice](kind: type[Choice], fields: Mapping[str, Any], where: str) -> Choice:
    """A choice from its entry in a table, or ValueError that says which one is wrong."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; run python -m pallas_kernels.tune to write it anew.") from error


def bucket(size: int) -> int:
    """Sizes that share a choice: the next power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def path_of(kind: str) -> Path:
    """The file of a kind of device."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The table in a file."""
    try:
        entries = json.loads(path.read_text())["choices"]
        return {(entry["op"], frozenset(entry["shape"].items())): entry["choice"] for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of choices ({error!r}); remove it, and run python -m pallas_kernels.tune to write it anew."
        ) from error


@functools.cache
def _table(kind: str) -> dict[Key, dict[str, Any]]:
    path = path_of(kind)
    if path.exists():
        return read(path)
    LOG.warning(
        "no tiles were measured on %s, safe ones run: python -m pallas_kernels.tune measures and keeps its own.", kind
    )
    return {}


@contextlib.contextmanager
def trying(op: str, candidate: Any, **shape: int | str) -> Iterator[None]:
    """For the tuner: `choice` gives the candidate, whatever the table says. What was traced before is not traced anew."""
    key = (op, frozenset(shape.items()))
    _tried[key] = candidate
    try:
        yield
    finally:
        del _tried[key]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A choice as a file has it: what was measured beside it."""

    op: str
    shape: dict[str, int | str]
    choice: dict[str, Any]
    us: float | None = None  # of the choice
    default_us: float | None = None  # of what would run without it
    workload: str | None = None  # that it was measured on

    @property
    def key(self) -> Key:
        return self.op, frozenset(self.shape.items())


def write(path: Path, kind: str, entries: Iterable[Entry], made: Mapping[str, Any]) -> None:
    """Add entries to a device's file, in place of earlier ones for the same op and shape. It is never there in part."""
    before = json.loads(path.read_text()) if path.exists() else {}
    merged = {entry.key: entry for entry in (Entry(**each) for each in before.pop("choices", []))}
    merged |= {entry.key: entry for entry in entries}
    rows = [dataclasses.asdict(merged[key]) for key in sorted(merged, key=lambda key: (key[0], str(sorted(key[1]))))]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(
        "  " + json.dumps({name: value for name, value in row.items() if value is not None}) for row in rows
    )
    head = json.dumps({"device": kind} | before | dict(made))[1:-1]
    whole = f'{{{head},\n "choices": [\n{text}\n ]}}\n'
    json.loads(whole)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(whole)
    os.replace(temporary, path)
