"""How records become examples: the settings that tokenising follows, as one value."""

import dataclasses
from typing import Literal, get_args

OVERLONG = Literal["truncate", "split", "drop", "error"]
BAD_ROWS = Literal["error", "drop"]
OVERLONG_CHOICES: tuple[str, ...] = get_args(OVERLONG)
BAD_ROWS_CHOICES: tuple[str, ...] = get_args(BAD_ROWS)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """SFTConfig has the same fields by the same names, `text_field` aside, which is its `dataset_text_field`."""

    text_field: str = "text"
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    instruction_part: str | None = None  # what introduces the user's turn
    response_part: str | None = None  # what introduces the assistant's; the loss is on what follows it
    overlong: OVERLONG = "truncate"  # what is done with an example longer than max_length
    bad_rows: BAD_ROWS = "error"  # whether a record that cannot be used stops the run or is left out
