"""The loss of a run as a picture: every logged value, and their running mean where there are many."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastjax.errors import writing
from fastjax.train.metrics import LogRecord

BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#6b7280"
SMOOTH_FROM = 30  # with fewer points a running mean only hides them


def plot_loss(records: Sequence[LogRecord], path: Path, title: str = "") -> None:
    """Writes a PNG of training and evaluation loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import, and only the end needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = series(records, "loss")
    if len(steps) >= SMOOTH_FROM:
        mean = running_mean(losses)
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, mean, color=BLUE, linewidth=2, label=f"training, running mean: {mean[-1]:.3f} at the end")
    elif steps:
        label = f"training: {losses[-1]:.3f} at the end"
        axes.plot(steps, losses, color=BLUE, linewidth=2, marker="o", markersize=4, label=label)
    eval_steps, eval_losses = series(records, "eval_loss")
    if eval_steps:
        label = f"evaluation: {eval_losses[-1]:.3f} at the end"
        axes.plot(eval_steps, eval_losses, color=ORANGE, linewidth=2, marker="D", markersize=5, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title(title, loc="left", fontsize=11, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    axes.set_xlim(left=0)
    if steps or eval_steps:
        axes.legend(frameon=False, loc="upper right")
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)


def series(records: Sequence[LogRecord], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was logged with a finite value, and the values."""
    points = [(record["step"], record[key]) for record in records if math.isfinite(record.get(key, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """The mean around each value, over `share` of the series on either side and less where that would leave it."""
    half = max(1, round(share * len(values)))
    sums = np.cumsum([0.0, *values])
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)
