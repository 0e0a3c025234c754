"""python -m pallas_kernels.tune [OP ...] [--shapes NAME ...] [--out FILE]: write the table of the GPU this runs on.

Without arguments every op is tuned on its own named workloads (see pallas_kernels.workloads), and the table goes where
the ops look for it. What is measured is kept at once: a run that is cut short loses nothing.
"""

import argparse
import datetime as dt
import importlib.metadata
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.dispatch import device_kind
from pallas_kernels.triton_call import triton_obstacle
from pallas_kernels.tune.ops import OPS
from pallas_kernels.tune.search import Session, in_turns
from pallas_kernels.tuning import path_of, read, write
from pallas_kernels.workloads import workload


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)}; all of them by default")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="workloads such as llama3.1-8b/gate_up/256, for one OP"
    )
    parser.add_argument("--out", type=Path, help="the table to write; by default the one that this GPU's ops read")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"nothing to tune in {', '.join(sorted(unknown))}: choose from {', '.join(OPS)}")
    if options.shapes and len(options.ops) != 1:
        parser.error("--shapes are those of one OP: name it.")
    try:
        for name in options.shapes or ():
            workload(name)
    except ValueError as error:
        parser.error(str(error))
    if obstacle := triton_obstacle():
        print(f"tuning measures this machine's GPU: {obstacle}.", file=sys.stderr)
        return 2
    path = options.out or path_of(device_kind())
    if obstacle := writing_obstacle(path):
        print(f"{path} cannot be written ({obstacle}): name another file with --out.", file=sys.stderr)
        return 2
    return _tune(options.ops or list(OPS), options.shapes, path)


def writing_obstacle(path: Path) -> str | None:
    """Why a table cannot be put there, or None: asked before minutes of measuring, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            read(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _tune(ops: Sequence[str], shapes: Sequence[str] | None, path: Path) -> int:
    failed = []
    for op in ops:
        tunables, own = OPS[op]
        for name in shapes or own:
            try:
                with Session(in_turns, lambda line: print(line, flush=True)) as session:
                    for tunable in tunables(name):
                        write(path, device_kind(), [session.tune(tunable)], _made())
            except Exception:  # one workload's failure must not cost the others' measurements
                traceback.print_exc()
                failed.append(f"{op} {name}")
    print(f"wrote {path}", *failed, sep="\nfailed: ")
    return 1 if failed else 0


def _made() -> dict[str, Any]:
    """When and with what the last entries were measured."""
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    versions = {name: packages[name] for name in ("jax", "jaxlib", "jax-triton", "triton") if name in packages}
    return {"date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
