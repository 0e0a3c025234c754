"""SFTTrainer: a data set and a model in, a trained adapter out.

A thin shell over the step. It prepares rows, runs the steps, and leaves in `output_dir`: checkpoints, metrics.jsonl,
loss.png and, at its top as TRL does, the adapter.
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from fastjax.data import Record, Rows, batch_at, in_order, pack, steps_per_epoch, tokenize_dataset, unpacked
from fastjax.errors import UserError
from fastjax.lora import trainable_parameters
from fastjax.parallel.mesh import axis_size
from fastjax.train.checkpoints import Fingerprint, Progress, find_checkpoint, restore_checkpoint, save_checkpoint
from fastjax.train.config import SFTConfig
from fastjax.train.console import Console
from fastjax.train.loss import Batch, LossFn, causal_lm_loss
from fastjax.train.metrics import LogRecord, MetricsFile, perplexity
from fastjax.train.optimizers import make_optimizer, resolve_name
from fastjax.train.plot import plot_loss
from fastjax.train.recorder import Recorder
from fastjax.train.schedules import make_schedule
from fastjax.train.step import BATCH_AXES, TrainState, init_train_state, make_train_step

PLOT_NAME = "loss.png"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    global_step: int
    final_loss: float  # of the last log record: the mean over the labelled tokens of its steps
    num_tokens: int  # trained on, padding not counted
    seconds: float
    log_history: list[LogRecord]


class SFTTrainer:
    """Supervised fine-tuning of a FastLanguageModel.

    `train_dataset` and `eval_dataset` are records, as fastjax.data takes them. `loss_fn(module, batch)` -> (sum of
    losses, number of tokens) replaces the language-model loss.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any = None,
        train_dataset: Iterable[Record],
        eval_dataset: Iterable[Record] | None = None,
        args: SFTConfig | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        self.args = args or SFTConfig()
        self.loss_fn = loss_fn
        self.output_dir = Path(self.args.output_dir)
        self.devices = math.prod(axis_size(model.mesh, axis) for axis in BATCH_AXES) if model.mesh else 1
        self.batch_size = self.args.per_device_train_batch_size * self.devices
        self.train_rows = self._rows(train_dataset, "train_dataset")
        self.eval_rows = None if eval_dataset is None else self._rows(eval_dataset, "eval_dataset")
        self.log_history: list[LogRecord] = []

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.train_rows, self.batch_size, self.args.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.steps_per_epoch)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """Trains to the end; from the latest checkpoint in output_dir for True, from the one at a path for a path."""
        args, began = self.args, time.perf_counter()
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = find_checkpoint(self.output_dir, resume)
        schedule = self._schedule()
        optimizer = self._optimizer(schedule)
        state = init_train_state(self.model, optimizer, seed=args.seed)
        fingerprint = self._fingerprint()
        progress = Progress()
        if checkpoint:
            state, progress = restore_checkpoint(checkpoint, state, fingerprint)
        step_fn = make_train_step(
            self.model, optimizer, self.model.mesh, gradient_checkpointing=self._checkpointing(), loss_fn=self.loss_fn
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        file = MetricsFile(self.output_dir, progress.step)
        self.log_history = file.records
        console = Console(self.total_steps, progress.step, args.disable_tqdm)
        recorder = Recorder(file, console, schedule, progress, self.steps_per_epoch)
        try:
            console.write(self._introduction(checkpoint))
            state = self._run(state, step_fn, recorder, fingerprint)
            self.model.load_train_state(state)
            self._finish(console)
        finally:
            console.close()
        losses = [record["loss"] for record in self.log_history if "loss" in record]
        return TrainResult(
            global_step=recorder.step,
            final_loss=losses[-1] if losses else math.nan,
            num_tokens=recorder.num_tokens,
            seconds=time.perf_counter() - began,
            log_history=self.log_history,
        )

    def evaluate(self) -> LogRecord:
        """{"eval_loss", "eval_perplexity"}: the mean loss over the labelled tokens of eval_dataset, and its exponential."""
        return self._evaluate(nnx.state(self.model.module, nnx.Param))

    def _run(self, state: TrainState, step_fn: Any, recorder: Recorder, fingerprint: Fingerprint) -> TrainState:
        args, total = self.args, self.total_steps
        for step in range(recorder.step, total):
            batch = batch_at(
                self.train_rows,
                step,
                batch_size=self.batch_size,
                accumulation=args.gradient_accumulation_steps,
                seed=args.seed,
            )
            state, metrics = step_fn(state, batch)
            recorder.add(metrics, int((batch["segment_ids"] > 0).sum()))
            done = step + 1
            if done % args.logging_steps == 0 or done == total:
                recorder.log()
            if self.eval_rows and (done == total or (args.eval_steps and done % args.eval_steps == 0)):
                recorder.settle()
                with recorder.speed.paused():
                    recorder.write(self._evaluate(state.params))
            if args.save_steps and done % args.save_steps == 0:
                recorder.settle()
                with recorder.speed.paused():
                    save_checkpoint(self.output_dir, state, recorder.progress, fingerprint, args.save_total_limit)
        return state

    def _finish(self, console: Console) -> None:
        self.model.save_pretrained(self.output_dir)
        plot_loss(self.log_history, self.output_dir / PLOT_NAME, self.model.name)
        what = "model" if self.model.lora is None else "adapter"
        console.write(f"saved the {what} in {self.output_dir}, its loss in {self.output_dir / PLOT_NAME}")

    def _evaluate(self, params: nnx.State) -> LogRecord:
        if not self.eval_rows:
            raise UserError("There is nothing to evaluate on: give SFTTrainer an eval_dataset.")
        definition, _, frozen = nnx.split(self.model.module, nnx.Param, ...)
        loss_fn = self.loss_fn or causal_lm_loss
        loss = tokens = 0.0
        for batch in in_order(self.eval_rows, self.args.per_device_eval_batch_size * self.devices):
            loss_sum, count = jax.device_get(_summed_loss(definition, loss_fn, params, frozen, batch))
            loss, tokens = loss + float(loss_sum), tokens + float(count)
        return {"eval_loss": loss / tokens, "eval_perplexity": perplexity(loss / tokens)}

    def _rows(self, dataset: Iterable[Record], name: str) -> Rows:
        args = self.args
        if self.tokenizer is None:
            raise UserError(f"{self.model.name!r} came without a tokenizer: pass tokenizer= to SFTTrainer.")
        row_length = args.max_length or args.max_seq_length or self.model.max_seq_length
        examples = tokenize_dataset(
            dataset,
            self.tokenizer,
            max_length=row_length,
            text_field=args.dataset_text_field,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            progress=not args.disable_tqdm,
        )
        if not examples:
            raise UserError(f"{name} is empty: give at least one record.")
        largest = max(int(example.input_ids.max()) for example in examples)
        if largest >= self.model.config.vocab_size:
            raise UserError(
                f"{name} has token {largest}, beyond the model's vocabulary of {self.model.config.vocab_size}:"
                " use the tokenizer that belongs to the model."
            )
        return pack(examples, row_length) if args.packing else unpacked(examples, row_length)

    def _schedule(self) -> optax.Schedule:
        args = self.args
        return make_schedule(
            args.lr_scheduler_type,
            args.learning_rate,
            warmup_steps=args.warmup_steps,
            warmup_ratio=args.warmup_ratio,
            total_steps=self.total_steps,
        )

    def _optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        args = self.args
        return make_optimizer(
            args.optim,
            schedule,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm,
        )

    def _checkpointing(self) -> str | bool:
        """The run's own choice, or with "auto" what get_peft_model was told."""
        own = self.args.gradient_checkpointing
        return getattr(self.model, "gradient_checkpointing", own) if own == "auto" else own

    def _fingerprint(self) -> Fingerprint:
        """What a checkpoint belongs to: everything that the state, or the order of the batches, follows from."""
        args, model, rows = self.args, self.model, self.train_rows
        lora = {} if model.lora is None else dataclasses.asdict(model.lora)
        checksum = 0
        for example in rows.examples:
            checksum = zlib.crc32(example.labels.tobytes(), zlib.crc32(example.input_ids.tobytes(), checksum))
        return {
            "model": dataclasses.asdict(model.config) | {"dtype": str(model.module.dtype)},
            "lora": {key: value for key, value in lora.items() if key != "random_state"},
            "optim": resolve_name(args.optim),
            "data": {
                "packing": args.packing,
                "max_length": rows.row_length,
                "rows": len(rows),
                "rows_per_step": self.batch_size * args.gradient_accumulation_steps,
                "checksum": checksum,
                "seed": args.seed,
            },
        }

    def _introduction(self, checkpoint: Path | None) -> str:
        rows, args = self.train_rows, self.args
        full = f", {rows.efficiency:.1%} full" if rows.fixed else ""
        cut = f", {rows.truncated:,} of them cut to {rows.row_length}" if rows.truncated else ""
        per_step = f"{self.batch_size} rows" + f" x {args.gradient_accumulation_steps}" * (
            args.gradient_accumulation_steps > 1
        )
        lines = [
            f"data: {len(rows.examples):,} examples{cut}, {rows.tokens:,} tokens, {len(rows):,} rows of up to"
            f" {rows.row_length}{full}",
            f"run:  {self.total_steps:,} steps of {per_step} ({self.total_steps / self.steps_per_epoch:.2f} epochs),"
            f" {trainable_parameters(self.model.module):,} trained parameters, {args.optim}, {jax.devices()[0].device_kind}",
        ]
        if checkpoint:
            lines.append(f"resuming from {checkpoint}")
        return "\n".join(lines)


@partial(jax.jit, static_argnums=(0, 1))
def _summed_loss(
    definition: nnx.GraphDef, loss_fn: LossFn, params: nnx.State, frozen: nnx.State, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    return loss_fn(nnx.merge(definition, params, frozen), batch)
