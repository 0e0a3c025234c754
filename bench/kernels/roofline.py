"""python -m bench.kernels.roofline RESULTS.json OUT.png: what the kernels reach of what the device can do.

Above the roofline: achieved TFLOP/s over flops per byte of device memory (each operand read once, each result written
once), under the measured copy bandwidth and matmul rate. Below the share of its own ceiling that each row reaches,
which is also where kernels stand that only move bytes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

TFLOP_PER_S, GB_PER_S = 790.0, 4100.0  # an H200's, for results in which no row measured its ceiling


def ceilings(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """TFLOP/s of the best matmul and GB/s of the best copy that any row measured."""
    matmul = max((row["ceiling"] for row in rows if "TFLOP/s" in row), default=TFLOP_PER_S)
    return matmul, max((row["ceiling"] for row in rows if "GB/s" in row), default=GB_PER_S)


def draw(record: dict[str, Any], path: Path) -> None:
    rows = [row for row in record["results"]["rows"] if "ratio" in row]
    heights = 5.5, 0.5 + 0.15 * len(rows)
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    roof, shares = figure.subplots(2, 1, height_ratios=heights)
    _draw_roof(roof, rows)
    _draw_shares(shares, rows)
    environment = record["environment"]
    devices = sorted(set(environment["device"]))
    figure.suptitle(f"{', '.join(devices)}, {environment['date'][:10]}, commit {environment['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _draw_roof(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    matmul, copy = ceilings(rows)
    placed = [row for row in rows if "TFLOP/s" in row and "flops_per_byte" in row]
    right = 2 * max([row["flops_per_byte"] for row in placed] + [1000 * matmul / copy, 1.0])
    intensities = [1.0, 1000 * matmul / copy, right]
    axes.plot(intensities, [min(matmul, copy * x / 1000) for x in intensities], color="black", linewidth=1)
    for op in dict.fromkeys(row["op"] for row in placed):
        mine = [row for row in placed if row["op"] == op]
        axes.plot([row["flops_per_byte"] for row in mine], [row["TFLOP/s"] for row in mine], "o", label=op, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="TFLOP/s")
    axes.set_title(f"Roofline: {matmul:.0f} TFLOP/s, {copy / 1000:.2f} TB/s")
    if placed:
        axes.legend(loc="lower right")


def _draw_shares(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    names = [f"{row['op']}: {row['case']} ({row['implementation']})" for row in rows]
    colours = {op: f"C{i % 10}" for i, op in enumerate(dict.fromkeys(row["op"] for row in rows))}
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color=[colours[row["op"]] for row in rows])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.margins(y=0.003)
    axes.invert_yaxis()
    axes.set(xlabel="share of the ceiling measured in the same run", title="Against the ceiling")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.roofline", description="Draw measured kernels.")
    parser.add_argument("results", type=Path, help="JSON written by python -m bench.kernels --out")
    parser.add_argument("image", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.image)


if __name__ == "__main__":
    main()
