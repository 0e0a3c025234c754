"""One run at a time in an output directory: two would overwrite each other's checkpoints and metrics."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fastjax.errors import UserError, writing

NAME = ".lock"


@contextlib.contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Holds the directory, which is made if missing. The system lets go of it when the process ends, however it does."""
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        opened = (output_dir / NAME).open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{output_dir} is in use by another run (process {holder}): wait for it, or choose another output_dir."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
