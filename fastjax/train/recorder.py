"""Keeps the account of a run: metrics of steps in, log records out.

A step's metrics are still being computed when the step returns. Fetching them at once would leave the device without
work, so they are fetched when LAG more steps are under way; only log records, evaluations and checkpoints wait for the
latest. The wait also keeps the host from running ahead without bound, and finds a run that has diverged soon.
"""

import collections
import math

import jax
import numpy as np
import optax

from fastjax.data import Position, Step
from fastjax.errors import UserError
from fastjax.train.checkpoints import Progress
from fastjax.train.console import Console
from fastjax.train.metrics import LogRecord, Metrics, MetricsFile, Speedometer, summarise

LAG = 2
MOST_SKIPPED_IN_ROW = 10
MOST_WORSE_THAN_CHANCE = 10


class Recorder:
    """`step` counts the steps whose metrics have arrived, `num_tokens` the tokens trained on, padding not counted.

    `chance` is the loss of a guess at random, where the loss is one to compare it with.
    """

    def __init__(
        self,
        file: MetricsFile,
        console: Console,
        schedule: optax.Schedule,
        progress: Progress,
        chance: float | None = None,
    ) -> None:
        self.file = file
        self.console = console
        self.schedule = schedule
        self.chance = chance
        self.step = progress.step
        self.num_tokens = progress.num_tokens
        self.position: Position | None = progress.position
        self.epoch = 0.0
        self.window: list[Metrics] = list(progress.window)
        self.speed = Speedometer()
        self.pending: collections.deque[tuple[dict[str, jax.Array], Step]] = collections.deque()
        self.lowest = math.inf
        self.worse_in_row = 0

    @property
    def progress(self) -> Progress:
        """What resuming after the latest step needs to know; settle first."""
        return Progress(self.step, self.num_tokens, self.position, self.window)

    def add(self, metrics: dict[str, jax.Array], data: Step) -> None:
        """A step on `data` has been dispatched."""
        self.pending.append((metrics, data))
        while len(self.pending) > LAG:
            self._fetch_oldest()

    def settle(self) -> None:
        """Waits for every step dispatched."""
        while self.pending:
            self._fetch_oldest()

    def log(self, waited: float = 0.0) -> LogRecord:
        """Writes the record of the steps since the last one, in which `waited` seconds went by waiting for data."""
        self.settle()
        updates = self.step - int(self.window[-1]["skipped"])
        rate, seconds = self.speed.report()
        values = summarise(self.window) | {
            "learning_rate": float(np.asarray(self.schedule(max(updates - 1, 0)))),  # that of the latest update
            "num_tokens": self.num_tokens,
            "tokens_per_second": rate,
            "data_wait": min(1.0, waited / max(seconds, 1e-9)),
        }
        memory = peak_memory()
        self.window = []
        return self.write(values if memory is None else values | {"peak_memory_gib": memory})

    def write(self, values: LogRecord) -> LogRecord:
        record = {"step": self.step, "epoch": self.epoch} | values
        self.file.append(record)
        self.console.record(record)
        return record

    def _fetch_oldest(self) -> None:
        metrics, data = self.pending.popleft()
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.window.append(fetched)
        self.step += 1
        self.num_tokens += data.tokens
        self.position, self.epoch = data.position, data.epoch
        self.speed.count(data.tokens)
        self.console.advance(self.speed.seconds_left(self.console.total - self.step))
        self._check(fetched)

    def _check(self, fetched: Metrics) -> None:
        """Stops a run that cannot come back."""
        if fetched["skipped_in_row"] >= MOST_SKIPPED_IN_ROW:
            raise UserError(
                f"Training stopped at step {self.step}: the gradients of {MOST_SKIPPED_IN_ROW} steps in a row were not"
                " finite, so none of them changed anything; lower learning_rate, use dtype bfloat16 instead of float16, or"
                " look for damaged weights or data."
            )
        loss = fetched["loss"]
        self.lowest = min(self.lowest, loss)
        diverged = self.chance is not None and loss > self.chance and loss > self.lowest + 1
        self.worse_in_row = self.worse_in_row + 1 if diverged else 0
        if self.worse_in_row >= MOST_WORSE_THAN_CHANCE:
            raise UserError(
                f"Training stopped at step {self.step}: it has diverged, with a loss of {loss:.2f} after one of"
                f" {self.lowest:.2f}, and above {self.chance:.2f}, which guessing at random gives, for"
                f" {MOST_WORSE_THAN_CHANCE} steps in a row; lower learning_rate (now"
                f" {float(np.asarray(self.schedule(self.step))):.3g}) or set warmup_steps or max_grad_norm."
            )


def peak_memory() -> float | None:
    """GiB, of the local device that used most; None where devices do not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak / 2**30 for peak in peaks if peak), default=None)
