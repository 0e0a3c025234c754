"""The loop of a run: step after step, and what is due after each: log, evaluation, checkpoint, stop."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastjax.data import Prefetched, Step
from fastjax.distributed.absent import is_of_another
from fastjax.distributed.agreement import Agreement
from fastjax.distributed.roles import wait_for_all
from fastjax.train.callbacks import BEST_METRIC, Callbacks
from fastjax.train.checkpoints import CheckpointWriter, Fingerprint, restore_checkpoint
from fastjax.train.interrupts import Interrupted, Interrupts
from fastjax.train.metrics import LogRecord, MetricsFile
from fastjax.train.recorder import Recorder
from fastjax.train.step import TrainState


@dataclasses.dataclass
class Run:
    """One run of a trainer (an SFTTrainer), from where `recorder` stands to the end."""

    trainer: Any
    step_fn: Callable
    recorder: Recorder
    writer: CheckpointWriter
    fingerprint: Fingerprint
    callbacks: Callbacks
    interrupts: Interrupts
    agreement: Agreement
    samples: MetricsFile

    def to_the_end(self, state: TrainState) -> TrainState:
        """The state after the last step, or the best one where that was asked for."""
        ahead = Prefetched(self.trainer.train_source.steps(self.recorder.position))
        self.callbacks.call("on_train_begin")
        try:
            state = self._steps(state, ahead)
            self.writer.wait()
            wait_for_all("last checkpoint")  # others may read it now
        except BaseException as error:
            if not is_of_another(error):  # without whom no checkpoint is ever whole
                with contextlib.suppress(Exception):  # what stopped the run is what is told
                    self.writer.wait()
            raise
        finally:
            ahead.close()
            self.callbacks.call("on_train_end")
        best = self._best_checkpoint()
        return state if best is None else restore_checkpoint(best, state, self.fingerprint)[0]

    def _steps(self, state: TrainState, ahead: Prefetched[Step]) -> TrainState:
        args, control, total = self.trainer.args, self.callbacks.control, self.trainer.total_steps
        waited = 0.0  # as of the last record
        for done in range(self.recorder.step + 1, total + 1):
            self.callbacks.call("on_step_begin")
            data = next(ahead)
            state, metrics = self.step_fn(state, self.trainer.placed(data.batch))
            self.recorder.add(metrics, data)
            self.callbacks.state.global_step, self.callbacks.state.epoch = done, data.epoch
            self.callbacks.call("on_step_end")
            stopping = done == total or control.should_training_stop
            if stopping or control.should_log or done % args.logging_steps == 0:
                record = self.recorder.log(ahead.waited - waited)
                waited, control.should_log = ahead.waited, False
                self.callbacks.call("on_log", logs=record)
            last = stopping and args.eval_strategy != "no"
            if self.trainer.eval_rows and (last or due(done, self.trainer.eval_every) or control.should_evaluate):
                self._evaluate(state)
            stopping_early = control.should_training_stop and not stopping
            if stopping_early and self.recorder.window:
                self.callbacks.call("on_log", logs=self.recorder.log(ahead.waited - waited))
            interrupted = self.agreement.vote(self.interrupts.received or 0)
            if interrupted or control.should_save or due(done, self.trainer.save_every):
                self._save(state)
            if interrupted and done < total:
                self._stop(signal.Signals(interrupted))
            if stopping or stopping_early:
                break
        return state

    def _evaluate(self, state: TrainState) -> None:
        self.recorder.settle()
        with self.recorder.speed.paused():
            record = self.recorder.write(self.trainer.evaluate_params(state.params))
            self._write_samples(state)
        control = self.callbacks.control
        control.should_evaluate = False
        if self.trainer.args.load_best_model_at_end and record is self.callbacks.state.best_evaluation:
            control.should_save = True
        self.callbacks.call("on_log", logs=record)
        self.callbacks.call("on_evaluate", metrics=record)

    def _write_samples(self, state: TrainState) -> None:
        """How the model of this step goes on from each of eval_prompts."""
        for prompt, completion in self.trainer.samples(state.params):
            self.samples.append({"step": self.recorder.step, "prompt": prompt, "completion": completion})
            self.recorder.console.write(f"  {prompt!r} -> {completion!r}")

    def _save(self, state: TrainState) -> None:
        self.recorder.settle()
        best = self._best_checkpoint()
        with self.recorder.speed.paused():
            self.writer.save(state, self.recorder.progress, self.fingerprint, protected=best)
        self.callbacks.control.should_save = False
        self.callbacks.call("on_save")

    def _best_checkpoint(self) -> Path | None:
        """Of the lowest evaluation loss so far, where the run wants to end with it."""
        best: LogRecord | None = self.callbacks.state.best_evaluation
        if best is None or BEST_METRIC not in best or not self.trainer.args.load_best_model_at_end:
            return None
        return self.trainer.output_dir / f"checkpoint-{best['step']}"

    def _stop(self, received: signal.Signals) -> None:
        self.writer.wait()
        wait_for_all("stopped")
        raise Interrupted(
            received,
            f"stopped by {received.name} after step {self.recorder.step}; {self.trainer.output_dir} holds its checkpoint:"
            " go on with resume_from_checkpoint=True.",
        )


def due(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps, never where that is none, is done after this one."""
    return bool(every) and step % every == 0
