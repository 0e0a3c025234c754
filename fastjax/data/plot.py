"""The lengths of a data set's examples as a picture."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from fastjax.errors import writing

BLUE, RED, GREY = "#2a6fbb", "#b91c1c", "#6b7280"


def plot_lengths(lengths: Int64[np.ndarray, "E"], row_length: int, path: Path, title: str = "") -> None:
    """Writes a PNG: how many examples have how many tokens, and the length of a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(lengths, bins=min(60, max(10, len(np.unique(lengths)))), color=BLUE)
    axes.axvline(row_length, color=RED, linewidth=1.5, linestyle="--", label=f"row: {row_length:,} tokens")
    axes.axvline(float(np.mean(lengths)), color=GREY, linewidth=1.5, label=f"mean: {np.mean(lengths):,.0f} tokens")
    axes.set(xlabel="tokens in an example", ylabel="examples")
    axes.set_title(title, loc="left", fontsize=11, color=GREY)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
