"""What a user did wrong, told in one sentence.

A message names the file, key, row or value at fault, what was expected and what to do. The command line prints it without
a traceback and exits with 2, so nothing in it may need the code to be understood.
"""

import difflib
import operator
from collections.abc import Iterable
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
