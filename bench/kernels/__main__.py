"""python -m bench.kernels [OP ...] [--gpus 0,1] [--out FILE]: measure, print a table, write it with its environment as JSON.

A row says op, case and implementation, the time in microseconds, what that is in TFLOP/s or GB/s, the ceiling measured
in the same run in the same unit, and the ratio of the two; the fastest peer and its time over ours; the bar that the row
is held against, and whether it is met. `flops_per_byte` places it on the roofline, which is drawn beside the JSON. What
disagrees with its reference is not timed: its row says so. Each row says when and at which commit it was measured: rows of
other ops that FILE holds stay. Ctrl-C ends it with what was measured by then, shown and kept. With --gpus each op has a
process of its own, on the first of these GPUs that is free: ceilings and peers of a row are still of its own process and GPU,
and all takes a part of the time.
"""

import argparse
import importlib
import json
import os
import pkgutil
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import bench.kernels
from bench.kernels import roofline
from bench.kernels._bars import judged
from bench.record import environment, write_record
from pallas_kernels.dispatch import cuda_capability

LONG = ("nf4_matmul", "flash_attention", "nf4_matvec")  # these take minutes
COLUMNS = ("op", "case", "implementation", "us", "TFLOP/s", "GB/s", "ceiling", "ratio", "extra_MiB")
COLUMNS += ("peer", "against_peer", "speedup", "bar", "met", "failed")


def benchmarks() -> dict[str, Callable[[], Iterable[dict[str, Any]]]]:
    """`rows` of each module of this folder that has one, by the module's name."""
    names = [module.name for module in pkgutil.iter_modules(bench.kernels.__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"bench.kernels.{name}") for name in names}
    return {name: module.rows for name, module in modules.items() if hasattr(module, "rows")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns; those that no row fills are left out."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(_aligned(cell, width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value}"


def _aligned(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)


def main(arguments: Sequence[str] | None = None) -> int:
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Measure kernels on this GPU.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(known)}; all of them by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--gpus", type=lambda text: text.split(","), default=[], help="measure on these at the same time"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(known):
        parser.error(f"no benchmark for {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if not options.gpus and cuda_capability() is None:  # with --gpus, each process asks for itself
        print("kernels are measured on an NVIDIA GPU, and jax runs on another device.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    before = rows_of(options.out) if options.out else []
    names = options.ops or list(known)
    interrupted = False
    try:
        for found, failures in spread(names, options.gpus) if options.gpus else here(known, names):
            rows += found
            failed += failures
            record(options.out, before, rows, failed)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    print(table(rows))
    print(verdict(rows))
    if options.out and rows:
        roofline.main([str(options.out), str(options.out.with_suffix(".png"))])
    return 130 if interrupted else 1 if failed or any("failed" in row for row in rows) else 0


def here(known: Mapping[str, Callable], names: Sequence[str]) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Rows one by one, judged, and the names of ops that could not be measured to their end."""
    now = environment()
    stamp = {"commit": now["commit"], "date": now["date"]}
    for name in names:
        started = time.perf_counter()
        try:
            for row in known[name]():  # what was measured before a failure, or before a limit of time, stays
                yield judged([row | stamp]), []
        except Exception:  # one op's failure must not cost the others' measurements
            traceback.print_exc()
            yield [], [name]
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def spread(names: Sequence[str], gpus: Sequence[str]) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """The same, op by op as they end, the long ones first; a process each."""
    free: queue.Queue[str] = queue.Queue()
    running: set[subprocess.Popen] = set()
    stopping = threading.Event()
    for gpu in gpus:
        free.put(gpu)

    def measured(name: str, out: Path) -> tuple[list[dict[str, Any]], list[str]]:
        command = [sys.executable, "-m", "bench.kernels", name, "--out", str(out)]
        gpu = free.get()
        try:
            alone = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            process = subprocess.Popen(command, env=alone, stdout=subprocess.DEVNULL)
            running.add(process)
            if stopping.is_set():  # begun while the others were told
                process.send_signal(signal.SIGINT)
            status = process.wait()
            running.remove(process)
        finally:  # or the others would wait for it forever
            free.put(gpu)
        rows = rows_of(out)
        ended = status == 0 or (status == 1 and any("failed" in row for row in rows))
        return rows, [] if rows and ended else [name]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(gpus)) as pool:
        ordered = sorted(names, key=lambda name: LONG.index(name) if name in LONG else len(LONG))
        waiting = {pool.submit(measured, name, Path(folder, f"{name}.json")) for name in ordered}
        try:
            for each in as_completed(waiting.copy()):
                waiting.remove(each)
                yield each.result()
        except KeyboardInterrupt:  # what runs has measured something; what waits is not begun
            stopping.set()
            begun = [each for each in waiting if not each.cancel()]
            for process in tuple(running):  # a terminal's Ctrl-C has reached them, another's signal has not
                process.send_signal(signal.SIGINT)
            for each in begun:
                yield each.result()
            raise


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What a file holds, if it is there."""
    return json.loads(out.read_text())["results"]["rows"] if out.exists() else []


def record(out: Path | None, before: list[dict[str, Any]], rows: list[dict[str, Any]], failed: list[str]) -> None:
    """Write what is measured so far, and rows from before of ops that are not."""
    if out:
        measured = {row["op"] for row in rows}
        kept = [row for row in before if row["op"] not in measured]
        write_record(out, {"rows": kept + rows, "failed": failed})


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """How many bars are met, and which are not."""
    held = [row for row in rows if "met" in row]
    missed = [f"{row['op']} {row['case']} ({row['implementation']}): {row['bar']}" for row in held if not row["met"]]
    return "\n".join([f"{len(held) - len(missed)} of {len(held)} bars met", *(f"not met: {each}" for each in missed)])


if __name__ == "__main__":
    sys.exit(main())
