"""Keeps the account of a run: metrics of steps in, log records out.

A step's metrics are still being computed when the step returns. Fetching them at once would leave the device without
work, so they are fetched when LAG more steps are under way; only log records, evaluations and checkpoints wait for the
latest. The wait also keeps the host from running ahead without bound, and finds a run that has diverged soon.
"""

import collections

import jax
import numpy as np
import optax

from fastjax.errors import UserError
from fastjax.train.checkpoints import Progress
from fastjax.train.console import Console
from fastjax.train.metrics import LogRecord, Metrics, MetricsFile, Speedometer, summarise

LAG = 2
MOST_SKIPPED_IN_ROW = 10


class Recorder:
    """`step` counts the steps whose metrics have arrived, `num_tokens` the tokens trained on, padding not counted."""

    def __init__(
        self, file: MetricsFile, console: Console, schedule: optax.Schedule, progress: Progress, steps_per_epoch: int
    ) -> None:
        self.file = file
        self.console = console
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.step = progress.step
        self.num_tokens = progress.num_tokens
        self.window: list[Metrics] = list(progress.window)
        self.speed = Speedometer()
        self.pending: collections.deque[tuple[dict[str, jax.Array], int]] = collections.deque()

    @property
    def progress(self) -> Progress:
        """What resuming after the latest step needs to know; settle first."""
        return Progress(self.step, self.num_tokens, self.window)

    def add(self, metrics: dict[str, jax.Array], tokens: int) -> None:
        """A step on so many tokens has been dispatched."""
        self.pending.append((metrics, tokens))
        while len(self.pending) > LAG:
            self._fetch_oldest()

    def settle(self) -> None:
        """Waits for every step dispatched."""
        while self.pending:
            self._fetch_oldest()

    def log(self) -> None:
        """Writes the record of the steps since the last one."""
        self.settle()
        updates = self.step - int(self.window[-1]["skipped"])
        self.write(
            summarise(self.window)
            | {
                "learning_rate": float(np.asarray(self.schedule(max(updates - 1, 0)))),  # that of the latest update
                "num_tokens": self.num_tokens,
                "tokens_per_second": self.speed.report(),
            }
        )
        self.window = []

    def write(self, values: LogRecord) -> None:
        record = {"step": self.step, "epoch": self.step / self.steps_per_epoch} | values
        self.file.append(record)
        self.console.record(record)

    def _fetch_oldest(self) -> None:
        metrics, tokens = self.pending.popleft()
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.window.append(fetched)
        self.step += 1
        self.num_tokens += tokens
        self.speed.count(tokens)
        self.console.advance(self.speed.seconds_left(self.console.total - self.step))
        if fetched["skipped_in_row"] >= MOST_SKIPPED_IN_ROW:
            raise UserError(
                f"Training stopped at step {self.step}: the gradients of {MOST_SKIPPED_IN_ROW} steps in a row were not finite, so"
                " none of them changed anything; lower learning_rate, use dtype bfloat16 instead of float16, or look for"
                " damaged weights or data."
            )
