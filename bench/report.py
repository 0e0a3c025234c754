"""Recorded results to what the README shows: its table of training speed, and plots.

    python -m bench.report [DEVICE] [--check]

Reads bench/results/DEVICE/{step,peers}.json, writes the table between README's figures marks, and beside the records
speed.png (tokens per second against peers), memory.png (peak memory over the context's length, where several lengths were
recorded) and time.png (where a step's time goes, where a trace was recorded). A cell without a record says so. With --check
nothing is written; the exit code says whether README has the table that the records make.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MARKS = "<!-- figures: {device}/step.json {device}/peers.json -->", "<!-- /figures -->"
# what each side calls it: keep everything, or keep less and work more
KEPT, REMADE = "nothing recomputed", "recomputed or offloaded"
POLICIES = {"none": KEPT, "False": KEPT, "full": REMADE, "offload": REMADE, "unsloth": REMADE, "gc": REMADE}
SHAPE = "llama3.1-8b"
PEERS = {"fastjax": "fastjax", "unsloth": "Unsloth", "hf": "transformers + peft + bitsandbytes"}
COLOURS = {"fastjax": "#2a6fbb", "unsloth": "#d9730d", "hf": "#9ca3af"}
KIND_COLOURS = (
    "#2a6fbb",
    "#d9730d",
    "#15803d",
    "#b91c1c",
    "#7c3aed",
    "#0e7490",
    "#a16207",
    "#be185d",
    "#6b7280",
    "#d1d5db",
)

type Row = dict[str, Any]


def load_rows(device: str) -> list[Row]:
    """Every recorded step, ours and the peers'."""
    rows = []
    for name in ("step", "peers"):
        path = RESULTS / device / f"{name}.json"
        rows += json.loads(path.read_text())["results"] if path.exists() else []
    return [row | {"kept": POLICIES.get(str(row.get("policy", row.get("gc"))), "as memory allows")} for row in rows]


def is_compared(row: Row) -> bool:
    """Whether the peers run it too; what they do not is in a table of its own."""
    return row.get("shape", SHAPE) == SHAPE and row["kept"] in (KEPT, REMADE) and not row.get("packed")


def cases(rows: Sequence[Row]) -> list[tuple[int, int, str]]:
    """(rows of a batch, their length, what is kept) of all rows, the short ones first."""
    return sorted({(row["bs"], row["seq"], row["kept"]) for row in rows}, key=lambda case: (case[1], case[0], case[2]))


def best(rows: Sequence[Row], case: tuple[int, int, str], peer: str) -> Row | None:
    """The fastest of a peer's rows of a case; a row that failed, if there is no other."""
    found = [row for row in rows if (row["bs"], row["seq"], row["kept"]) == case and row["peer"] == peer]
    return max(found, key=lambda row: row.get("tok_s", 0), default=None)


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of our rows of each batch, length and policy the one recorded last, the short ones first."""
    ours = sorted((row for row in rows if row["peer"] == "fastjax"), key=lambda row: row.get("date", ""))
    cases = {(row["seq"], row["bs"], row["policy"]): row for row in ours}
    return [cases[case] for case in sorted(cases)]


def table(rows: Sequence[Row]) -> str:
    lines = [f"| batch x sequence | {' | '.join(PEERS.values())} |", f"|---|{'---|' * len(PEERS)}"]
    for case in cases(rows):
        cells = []
        for peer in PEERS:
            row = best(rows, case, peer)
            if row is None:
                cells.append("not recorded")
            elif "failed" in row:
                cells.append(row["failed"])
            else:
                cells.append(f"{row['tok_s']:,} at {row['peak_GiB']}")
        lines.append(f"| {case[0]}x{case[1]}, {case[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def own_table(rows: Sequence[Row]) -> str:
    """What only we run; "" if nothing was recorded."""
    lines = [
        f"| {row.get('shape', SHAPE)}, {row['bs']}x{row['seq']}{', packed documents' if row.get('packed') else ''},"
        f" {row['kept']} | {row['tok_s']:,} at {row['peak_GiB']} | {row['fraction_of_limit']} |"
        for row in rows
    ]
    head = ["", "| fastjax alone | tokens/s at peak GiB | of the limit that its products set |", "|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def with_table(text: str, device: str, made: str) -> str:
    begin, end = (mark.format(device=device) for mark in MARKS)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no {begin} ... {end} to put the table into.")
    return pattern.sub(lambda _: f"{begin}\n{made}\n{end}", text)


def draw_speed(rows: Sequence[Row], path: Path, title: str) -> None:
    shown = [case for case in cases(rows) if best(rows, case, "fastjax")]
    figure, axes = _figure(0.5 + 0.9 * len(shown), title)
    height = 0.8 / len(PEERS)
    for number, peer in enumerate(PEERS):
        for place, case in enumerate(shown):
            row = best(rows, case, peer)
            speed = row.get("tok_s") if row else None
            if speed:
                at = place + (number - 1) * height
                axes.barh(at, speed, height * 0.92, color=COLOURS[peer], label=PEERS[peer] if place == 0 else None)
                axes.text(speed, at, f" {speed:,}, {row['peak_GiB']:.1f} GiB", va="center", fontsize=8)  # pyright: ignore
    axes.set_yticks(range(len(shown)), [f"{bs}x{seq}\n{kept}" for bs, seq, kept in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")
    axes.margins(x=0.25)
    axes.grid(axis="x", color="#e5e7eb")
    _save(figure, axes, path, legend=True)


def draw_memory(rows: Sequence[Row], path: Path, title: str) -> bool:
    """False where no policy was recorded at several lengths."""
    ours = [row for row in latest(rows) if row["bs"] == 1]
    lines = {policy: [(row["seq"], row["peak_GiB"]) for row in ours if row["policy"] == policy] for policy in POLICIES}
    lines = {policy: points for policy, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    figure, axes = _figure(4, title)
    for policy, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=policy)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of one row", ylabel="peak GiB")
    axes.grid(color="#e5e7eb")
    _save(figure, axes, path, legend=True)
    return True


def draw_time(rows: Sequence[Row], path: Path, title: str) -> bool:
    """False where no trace was recorded."""
    traced = latest([row for row in rows if row.get("ms_by_kind")])
    if not traced:
        return False
    totals: dict[str, float] = {}
    for row in traced:
        for kind, milliseconds in row["ms_by_kind"].items():
            totals[kind] = totals.get(kind, 0) + milliseconds / sum(row["ms_by_kind"].values())
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    figure, axes = _figure(1.2 + 0.6 * len(traced), title)
    for place, row in enumerate(traced):
        left = 0.0
        for kind, colour in zip(kinds, KIND_COLOURS, strict=False):
            share = 100 * row["ms_by_kind"].get(kind, 0) / (row["step_s"] * 1e3)
            axes.barh(place, share, 0.7, left, color=colour, label=kind if place == 0 else None)
            if share > 4:
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white")
            left += share
    axes.set_yticks(range(len(traced)), [f"{row['bs']}x{row['seq']}, {row['policy']}" for row in traced], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of the step's time", xlim=(0, 105))
    _save(figure, axes, path, legend=True)
    return True


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, max(3.0, height)), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, color="#6b7280")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path, legend: bool) -> None:
    if legend:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="h200")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    rows = load_rows(options.device)
    text = README.read_text()
    rows, others = [row for row in rows if is_compared(row)], [row for row in rows if not is_compared(row)]
    wanted = with_table(text, options.device, f"{table(rows)}\n{own_table(others)}".rstrip())
    if options.check:
        return int(wanted != text)
    README.write_text(wanted)
    folder = RESULTS / options.device
    environment = json.loads((folder / "step.json").read_text())["environment"]
    title = f"QLoRA, Llama-3.1-8B shapes, {environment['device'][0]}, {environment['date'][:10]}"
    draw_speed(rows, folder / "speed.png", title)
    for draw, name in ((draw_memory, "memory.png"), (draw_time, "time.png")):
        if not draw(rows, folder / name, title):
            print(f"{name}: not drawn, nothing was recorded for it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
