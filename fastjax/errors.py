"""What a user did wrong, told in one sentence.

A message names the file, key, row or value at fault, what was expected and what to do. The command line prints it without
a traceback and exits with 2, so nothing in it may need the code to be understood.
"""

import contextlib
import difflib
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, described by its message alone."""


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raises for the first key of `given` that `where` (such as "section 'train'") does not know, naming the nearest it does."""
    names = list(valid)
    for key in given:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it knows {', '.join(sorted(names))}."
            raise UserError(f"Unknown key {key!r} in {where}: {hint}")


def whole_number(value: Any, what: str) -> int:
    """As an int, from any integer type; `what` the value is, for the error where it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{what} must be a whole number, not {value!r}.") from None


@contextlib.contextmanager
def writing(path: Path, *refusals: type[Exception]) -> Iterator[None]:
    """What the system, or a library by one of `refusals`, has against writing `path`, as a sentence."""
    try:
        yield
    except (OSError, *refusals) as error:
        raise cannot_write(path, getattr(error, "strerror", None) or error) from error


def check_writable(path: Path) -> None:
    """Refuses a directory, there or to be made, that cannot be written into."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise cannot_write(path, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise cannot_write(path, f"{there} is read-only")


def cannot_write(path: Path, reason: Any) -> UserError:
    return UserError(f"{path} cannot be written ({reason}): give a place that can be written to and has room.")
