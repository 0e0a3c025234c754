"""Directories written whole or not at all.

Files are written to a hidden staging directory beside (or, where the target exists, inside) the target and renamed into
place when all of them are complete. A new directory appears by one rename. In an existing one the files it `replaces`
go first and an index comes last, so that an interruption in between leaves a directory that is refused, never a mixture
of old and new weights that loads.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastjax.errors import writing


@contextmanager
def staged_directory(target: str | Path, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A directory to write files into, which become those of `target` if the block ends without an exception.

    `replaces`: glob patterns of files that an earlier save may have left in `target` and that must not outlive it.
    """
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot write into {target}, which is a file; give the name of a directory.")
    exists = target.is_dir()
    parent = target if exists else target.parent
    with writing(target, SafetensorError):
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=parent))
        try:
            yield staging
            for path in staging.iterdir():
                path.chmod(0o666 & ~_umask())  # some writers' are private, as is what mkdtemp makes
            if exists:
                _move_files(staging, target, replaces)
            else:
                staging.chmod(0o777 & ~_umask())
                staging.rename(target)
                _sync_directory(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move_files(staging: Path, target: Path, replaces: Sequence[str]) -> None:
    for pattern in replaces:
        for stale in target.glob(pattern):
            stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: (path.name.endswith(".index.json"), path.name)):
        path.replace(target / path.name)
    _sync_directory(target)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
