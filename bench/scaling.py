r"""Training on several GPUs of one host: tokens per second of each GPU, against one alone.

    python -m bench.scaling [--shape llama3.1-8b] [--meshes data=2 fsdp=2 data=4 fsdp=4] [--out scaling.json]
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m bench.scaling --no-alone --shape llama3.1-405b --meshes fsdp=2 fsdp=4 \
        --batch 1 --policy full --steps 2 --out scaling_405b.json

Weak scaling: every GPU has --batch rows of --seq tokens; those that share rows (context) have so much longer ones, whose
tokens take more work, which the fraction of the limit counts. Each mesh is a process of its own, bench.step on as many GPUs
as the mesh has, which records its own row; the first is one GPU, unless --no-alone says that the model does not fit there.
Weights are random, made on each GPU for itself. Beside the peak stands what a GPU holds between steps: weights and states. A
row of this commit that is recorded already is not measured again. A plot stands beside the record.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.record import commit
from bench.step import mesh_sizes

ALONE = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--meshes", nargs="+", default=["data=2", "fsdp=2", "data=4", "fsdp=4"])
    parser.add_argument("--batch", type=int, default=4, help="rows of each GPU")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--policy", default="none")
    parser.add_argument("--steps", type=int, default=6, help="after the first two")
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, default=True, help="measure one GPU too")
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    arguments = parser.parse_args()
    for mesh in [*[ALONE] * arguments.alone, *arguments.meshes]:
        sizes = mesh_sizes(mesh) if mesh else {}
        if not any(row["mesh"] == sizes and row["commit"] == commit() for row in recorded(arguments.out)):
            measure(mesh, sizes, arguments)
    rows = recorded(arguments.out)
    if not rows:
        raise SystemExit("nothing was measured: what each mesh said stands above.")
    print(table(rows))
    plot(rows, arguments.out.with_suffix(".png"))


def recorded(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"] if path.exists() else []


def measure(mesh: str, sizes: dict[str, int], arguments: argparse.Namespace) -> None:
    """Has bench.step add a row. This process leaves the GPUs alone."""
    devices, context = math.prod(sizes.values()), sizes.get("context", 1)
    command = [sys.executable, "-m", "bench.step", "--shape", arguments.shape, "--policy", arguments.policy]
    command += ["--batch", str(devices // context * arguments.batch), "--seq", str(context * arguments.seq)]
    command += ["--steps", str(arguments.steps), "--out", str(arguments.out)]
    command += ["--mesh", mesh] * bool(mesh)
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(names.split(",")[:devices])}
    if subprocess.run(command, env=os.environ | visible, check=False).returncode:
        print(f"{mesh or 'one GPU'}: not measured", file=sys.stderr)  # the others may still be


def each(row: dict[str, Any]) -> float:
    """Tokens per second of one of a row's GPUs."""
    return row["tok_s"] / row["devices"]


def alone_and_others(rows: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    alone = next((row for row in rows if not row["mesh"]), None)
    return alone, sorted((row for row in rows if row["mesh"]), key=lambda row: row["devices"])


def table(rows: list[dict[str, Any]]) -> str:
    alone, others = alone_and_others(rows)
    heads = f"{'tokens/s of each':>18}{'of one alone':>14}{'of the limit':>14}{'held GiB':>10}{'peak GiB':>10}"
    lines = [f"{'mesh':24}{heads}"]
    for row in [*[alone] * (alone is not None), *others]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one GPU"
        share = f"{each(row) / each(alone):.3f}" if alone else "-"
        memory = f"{row.get('held_GiB', '-'):>10}{row['peak_GiB']:>10}"
        lines.append(f"{mesh:24}{each(row):18,.0f}{share:>14}{row['fraction_of_limit']:14.3f}{memory}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second of each GPU over their number, one line for each combination of axes."""
    alone, others = alone_and_others(rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in sorted({", ".join(row["mesh"]) for row in others}):
        points = [(row["devices"], each(row)) for row in others if ", ".join(row["mesh"]) == name]
        first = [(1, each(alone))] if alone else []
        axes.plot(*zip(*first, *points, strict=True), marker="o", label=name)
    axes.set(xlabel="GPUs", ylabel="tokens/s of each GPU", title="the same rows on every GPU")
    axes.set_ylim(0, 1.1 * max(map(each, rows)))
    axes.set_xticks(sorted({row["devices"] for row in rows}))
    axes.grid(alpha=0.3)
    if others:
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
