"""What a run reports: the metrics of its steps, gathered over `logging_steps`, and the file they are written to.

metrics.jsonl holds one record a line. Training writes {"step", "epoch", "loss", "grad_norm", "learning_rate", "skipped",
"num_tokens", "tokens_per_second", "data_wait", "peak_memory_gib"} (the share of time spent waiting for data; the device's
memory, where it says), evaluation {"step", "epoch", "eval_loss", "eval_perplexity"}. A number that is not finite is written
as null, since JSON has no other word for it.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastjax.distributed.roles import is_writer
from fastjax.errors import writing

type Metrics = dict[str, float]
type LogRecord = dict[str, Any]

FILE_NAME = "metrics.jsonl"


def summarise(window: list[Metrics]) -> Metrics:
    """The metrics of some steps as one: the loss over all their labelled tokens, the mean gradient norm.

    Whatever is not finite stays out of the means; the steps it made the trainer skip are counted.
    """
    losses = [(step["loss"], step["tokens"]) for step in window if math.isfinite(step["loss"])]
    norms = [step["grad_norm"] for step in window if math.isfinite(step["grad_norm"])]
    tokens = sum(count for _, count in losses)
    return {
        "loss": sum(loss * count for loss, count in losses) / tokens if tokens else math.nan,
        "grad_norm": sum(norms) / len(norms) if norms else math.nan,
        "skipped": sum(step["skipped_in_row"] > 0 for step in window),
    }


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class MetricsFile:
    """A file of records, each of a step, such as metrics.jsonl; `records` holds what is in it."""

    def __init__(self, output_dir: Path, step: int, name: str = FILE_NAME) -> None:
        """Opens the file of a run that goes on after `step`: what was logged past it, before a kill, is dropped.

        Of several processes one writes; the others keep the same records in memory.
        """
        self.path = output_dir / name
        self.records = [record for record in read_metrics(self.path) if record["step"] <= step]
        if not is_writer() or not self.path.exists():  # a new one is made by its first record
            return
        temporary = self.path.with_suffix(".tmp")
        with writing(self.path):
            temporary.write_text("".join(map(to_line, self.records)), encoding="utf-8")
            os.replace(temporary, self.path)

    def append(self, record: LogRecord) -> None:
        self.records.append(record)
        if not is_writer():
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(to_line(record))


def to_line(record: LogRecord) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> list[LogRecord]:
    """The records of a file, [] where there is none. A last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records


class Speedometer:
    """Tokens a second since the last report, and what a step takes; time spent `paused` does not count.

    The first step compiles. It is kept out of both, unless a report comes right after it.
    """

    def __init__(self) -> None:
        self.run_start = self.window_start = time.perf_counter()
        self.first_rate: float | None = None
        self.steps = 0
        self.window_tokens = 0

    def count(self, tokens: int) -> None:
        """A step of so many tokens has finished."""
        if self.first_rate is None:
            now = time.perf_counter()
            self.first_rate = tokens / max(now - self.run_start, 1e-9)
            self.run_start = self.window_start = now
        else:
            self.steps += 1
            self.window_tokens += tokens

    def report(self) -> tuple[float, float]:
        """Tokens a second since the last report, and how many seconds that were."""
        now = time.perf_counter()
        seconds = now - self.window_start
        rate = self.window_tokens / max(seconds, 1e-9) if self.steps else self.first_rate or 0.0
        self.window_start, self.window_tokens = now, 0
        return rate, seconds

    def seconds_left(self, steps: int) -> float | None:
        """How long so many more steps take; None before there is a step to judge by."""
        return steps * (time.perf_counter() - self.run_start) / self.steps if self.steps else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            self.run_start += taken
            self.window_start += taken
