"""What a measurement is recorded with: without these a figure does not count."""

import datetime as dt
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "bitsandbytes", "unsloth")
PACKAGES += ("triton", "jax-triton", "tokamax")


def environment() -> dict[str, Any]:
    """Device, versions, command, commit and date of this run."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "device": [device.device_kind for device in jax.local_devices()],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": sys.version.split()[0],
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def write_record(path: str | Path, results: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write results with their environment, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # a run that is killed leaves no half of a record
    temporary.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    os.replace(temporary, path)


def print_row(row: dict[str, Any], out: Path | None) -> None:
    """One JSON line; with `out` also a row of that record."""
    print(json.dumps(row), flush=True)
    if out:
        append_record(out, row)


def append_record(path: str | Path, row: dict[str, Any]) -> None:
    """Add a row to a file of them, in place of an earlier one of the same command. Each row says when, at which commit and on
    what it was measured: a file may be renewed in parts.
    """
    path, now = Path(path), environment()
    row = row | {name: now[name] for name in ("commit", "date", "device")} | {"command": _without_out(now["command"])}
    before = json.loads(path.read_text())["results"] if path.exists() else []
    write_record(path, [*(each for each in before if each["command"] != row["command"]), row])


def _without_out(command: str) -> str:
    return re.sub(r" --out[ =]\S+", "", command)


def commit() -> str | None:
    """The one that is checked out."""
    # a machine that got the sources without their history is told which commit they are
    return os.environ.get("FASTJAX_COMMIT") or _output("git", "rev-parse", "--short", "HEAD")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
