"""Training on several GPUs of one host: tokens per second of each GPU, against one alone.

    python -m bench.scaling [--shape llama3.1-8b] [--meshes data=2 fsdp=2 data=4 fsdp=4] [--out scaling.json]

Weak scaling: every GPU has --batch rows of --seq tokens. Each mesh is a process of its own, bench.step on as many GPUs as
the mesh has; the first is one GPU. With --out, a plot stands beside the record, and a record of the same commit that is
there already is gone on with.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.record import append_record, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--meshes", nargs="+", default=["data=2", "fsdp=2", "data=4", "fsdp=4"])
    parser.add_argument("--batch", type=int, default=4, help="rows of each GPU")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--policy", default="none")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.out.parent if arguments.out else Path(tempfile.mkdtemp())
    out = arguments.out or folder / "scaling.json"
    for mesh in ["", *arguments.meshes]:
        rows = recorded(out)
        if any(row["mesh"] == mesh for row in rows):
            continue
        row = step_on(mesh, arguments) | {"mesh": mesh}
        each = row.get("tok_s", 0) / row["devices"]
        alone = next((row["tok_s_of_each"] for row in rows if not row["mesh"]), each)
        row |= {"tok_s_of_each": round(each), "of_one_alone": round(each / max(alone, 1), 3)}
        print(json.dumps(row), flush=True)
        append_record(out, row)  # after each: a later one may fail, or not fit the time
        plot(recorded(out), out.with_suffix(".png"))


def recorded(path: Path) -> list[dict[str, Any]]:
    """The rows of this commit."""
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return [row for row in rows if row["commit"] == environment()["commit"]]


def step_on(mesh: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """bench.step's result on this mesh, or what kept it from one."""
    devices = math.prod(int(part.partition("=")[2]) for part in mesh.split(",")) if mesh else 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, "-m", "bench.step", "--shape", arguments.shape, "--policy", arguments.policy]
        command += ["--batch", str(devices * arguments.batch), "--seq", str(arguments.seq), "--out", str(out)]
        command += ["--mesh", mesh] * bool(mesh) + ["--trace"] * arguments.trace
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        visible = ",".join(names.split(",")[:devices])
        done = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": visible}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"devices": devices, "failed": done.stderr[-1500:]}
        return json.loads(out.read_text())["results"][0]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second of each GPU over their number, one line for each axis."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    alone, *others = sorted((row for row in rows if row["tok_s_of_each"]), key=lambda row: row["devices"])
    names = {row["mesh"]: re.sub(r"=\d+", "", row["mesh"]) for row in others}
    for name in sorted(set(names.values())):
        points = [(1, alone["tok_s_of_each"])]
        points += [(row["devices"], row["tok_s_of_each"]) for row in others if names[row["mesh"]] == name]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(
        xlabel="GPUs",
        ylabel="tokens/s of each GPU",
        ylim=(0, 1.1 * alone["tok_s_of_each"]),
        title="the same rows on every GPU",
    )
    axes.set_xticks(sorted({row["devices"] for row in rows}))
    axes.grid(alpha=0.3)
    if others:
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
