"""What the demo shows: lines in the terminal, and one picture of both trainings and of the answers."""

import os
from collections.abc import Sequence
from typing import Any

from fastjax.demo.settings import Settings
from fastjax.train.plot import BLUE, GREY, ORANGE, running_mean, series


def heading(number: int, text: str) -> None:
    print(f"\n{number}  {text}", flush=True)


def line(text: str) -> None:
    print(f"   {text}", flush=True)


def answer_table(questions: Sequence[str], before: Sequence[str], after: Sequence[str], right: Sequence[str]) -> None:
    """Questions with their answers, and a mark where the tuned one is right."""
    rows = [("question", "before", "after", "")]
    for question, old, new, truth in zip(questions, before, after, right, strict=True):
        rows.append((question, old, new, "right" if new == truth else f"wrong, it is {truth}"))
    cells = [[shorten(cell, 48) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    for row in cells:
        line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def shorten(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def draw(
    settings: Settings, base_losses: Sequence[float], log: Sequence[dict[str, Any]], scores: dict[str, float]
) -> None:
    """Writes the picture: the base's loss, the adapter's loss, and the share of right answers before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    base, tuning, answers = figure.subplots(1, 3, width_ratios=[5, 5, 3])

    steps = range(1, len(base_losses) + 1)
    base.plot(steps, base_losses, color=BLUE, alpha=0.3, linewidth=1)
    base.plot(steps, running_mean(base_losses, share=0.02), color=BLUE, linewidth=2)
    base.set_title("1  base model, every weight trained", loc="left", fontsize=11)

    tuning.plot(*series(log, "loss"), color=BLUE, linewidth=2, marker="o", markersize=4, label="questions tuned on")
    held_out = series(log, "eval_loss")
    tuning.plot(*held_out, color=ORANGE, linewidth=2, marker="D", markersize=5, label="questions held out")
    tuning.set_title("2  LoRA on the base in 4 bits", loc="left", fontsize=11)
    tuning.legend(frameon=False)
    for axes in (base, tuning):
        axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None), xlim=(0, None))
        axes.grid(color="#e5e7eb", linewidth=0.8)

    bars = answers.bar(list(scores), [100 * score for score in scores.values()], color=[GREY, BLUE, BLUE], width=0.6)
    answers.bar_label(bars, fmt="%.0f %%", padding=2)
    answers.set(ylim=(0, 112), yticks=range(0, 101, 25), ylabel="held-out questions right (%)")
    answers.set_title("3  answers", loc="left", fontsize=11)
    for axes in (base, tuning, answers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    temporary = settings.picture.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, settings.picture)
