"""SFTTrainer: a data set and a model in, a trained adapter out.

A thin shell over the step. It prepares rows, runs the steps, and leaves in `output_dir`: checkpoints, metrics.jsonl,
loss.png and, at its top as TRL does, the adapter.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fastjax.compile_cache import enable_compile_cache
from fastjax.data import ExampleRecords, Record, RowSource, in_order
from fastjax.distributed.agreement import Agreement
from fastjax.distributed.roles import is_writer, wait_for_all
from fastjax.elsewhere import SFT_TRAINER, TRAINER, Instead, answering, attributes
from fastjax.errors import UserError
from fastjax.lora import trainable_parameters
from fastjax.parallel.compressed import bits_of
from fastjax.parallel.hosts import check_every_process_takes_part, own_rows, place_batch
from fastjax.parallel.mesh import BATCH_AXES, axis_size, summing_devices
from fastjax.train.callbacks import Callbacks, EarlyStoppingCallback, TrainerControl, TrainerState, check_callbacks
from fastjax.train.checkpoints import CheckpointWriter, Fingerprint, Progress, find_checkpoint, restore_checkpoint
from fastjax.train.config import SFTConfig
from fastjax.train.console import Console
from fastjax.train.interrupts import Interrupts
from fastjax.train.loss import Batch, LossFn, causal_lm_loss
from fastjax.train.metrics import LogRecord, MetricsFile, perplexity
from fastjax.train.optimizers import make_optimizer, resolve_name
from fastjax.train.plot import plot_loss
from fastjax.train.recorder import LAG, Recorder
from fastjax.train.reporters import make_reporters
from fastjax.train.run import Run
from fastjax.train.run_lock import run_lock
from fastjax.train.samples import continuations, sample_requests
from fastjax.train.schedules import make_schedule
from fastjax.train.sources import describe_source, make_rows, make_source
from fastjax.train.step import init_train_state, make_mesh_loss, make_train_step

PLOT_NAME = "loss.png"
SAMPLES_NAME = "samples.jsonl"  # continuations of eval_prompts
OF_THE_CONFIG = {
    field.name: Instead("it is a setting of SFTConfig, args=SFTConfig(...)") for field in dataclasses.fields(SFTConfig)
}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    global_step: int
    final_loss: float  # of the last log record: the mean over the labelled tokens of its steps
    num_tokens: int  # trained on, padding not counted
    seconds: float
    log_history: list[LogRecord] = dataclasses.field(repr=False)  # a notebook shows what a cell returns

    @property
    def metrics(self) -> dict[str, float]:
        """`seconds` where scripts for transformers look for it."""
        return {"train_runtime": self.seconds}


class SFTTrainer:
    """Supervised fine-tuning of a FastLanguageModel.

    `train_dataset` and `eval_dataset` are records, as fastjax.data takes them. `loss_fn(module, batch)` -> (sum of
    losses, number of tokens) replaces the language-model loss.
    """

    if not TYPE_CHECKING:
        __getattr__ = attributes(TRAINER, "SFTTrainer")

    @answering({**OF_THE_CONFIG, **SFT_TRAINER}, "SFTTrainer")
    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        train_dataset: Iterable[Record],
        eval_dataset: Iterable[Record] | None = None,
        args: SFTConfig | None = None,
        loss_fn: LossFn | None = None,
        callbacks: Iterable[Any] = (),
    ) -> None:
        check_arguments(model, args)
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        self.args = args or SFTConfig()
        self.loss_fn = loss_fn
        self.callbacks = check_callbacks(callbacks)
        self.output_dir = Path(self.args.output_dir)
        check_every_process_takes_part(model.mesh)
        self.devices = math.prod(axis_size(model.mesh, axis) for axis in BATCH_AXES) if model.mesh else 1
        bits_of(
            self.args.gradient_reduction, summing_devices(model.mesh)
        )  # refuses what makes no sense, before anything takes time
        self.records = train_dataset
        self.eval_records = eval_dataset
        self.log_history: list[LogRecord] = []
        self.prepare_data()

    def prepare_data(self) -> None:
        """Makes batches of the data sets, as `args` says."""
        if self.tokenizer is None:
            raise UserError(f"{self.model.name!r} came without a tokenizer: pass tokenizer= to SFTTrainer.")
        args = self.args
        if args.eval_prompts and self.eval_records is None:
            raise UserError("eval_prompts are continued at every evaluation, which takes an eval_dataset: give one.")
        self.sample_requests = sample_requests(args.eval_prompts, self.tokenizer, self.model, args.eval_max_new_tokens)
        batch_size = args.per_device_train_batch_size * self.devices
        own = own_rows(self.model.mesh, batch_size)
        self.train_source = make_source(self.records, self.tokenizer, self.model, args, batch_size, own)
        self.eval_rows = None
        if self.eval_records is not None:
            self.eval_rows = make_rows(self.eval_records, self.tokenizer, self.model, args, "eval_dataset")
        elif args.load_best_model_at_end or args.early_stopping_patience:
            raise UserError("load_best_model_at_end and early_stopping_patience need an eval_dataset to judge by.")

        strategies = {"eval_strategy": args.eval_strategy, "save_strategy": args.save_strategy}
        if self.train_source.steps_per_epoch is None and "epoch" in strategies.values():
            name = next(name for name, value in strategies.items() if value == "epoch")
            raise UserError(f"{name}='epoch' needs a data set with a length, which a stream has not: choose 'steps'.")

    @property
    def train_dataset(self) -> Sequence[dict[str, list[int]]] | Iterable[Record]:
        """Of each example what is trained on, input_ids and labels; a stream as it is."""
        source = self.train_source
        return ExampleRecords(source.rows.examples) if isinstance(source, RowSource) else self.records

    @property
    def eval_dataset(self) -> Sequence[dict[str, list[int]]] | None:
        return None if self.eval_rows is None else ExampleRecords(self.eval_rows.examples)

    @property
    def eval_every(self) -> int | None:
        """Steps from one evaluation to the next; None: at the end, if at all."""
        args = self.args
        if args.eval_strategy == "epoch":
            return self.train_source.steps_per_epoch
        return {"no": None, "steps": args.eval_steps or args.logging_steps, None: args.eval_steps}[args.eval_strategy]

    @property
    def save_every(self) -> int | None:
        args = self.args
        return {"no": None, "steps": args.save_steps, "epoch": self.train_source.steps_per_epoch}[args.save_strategy]

    @property
    def total_steps(self) -> int:
        per_epoch = self.train_source.steps_per_epoch
        if self.args.max_steps > 0 or per_epoch is None:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """Trains to the end; from the latest checkpoint in output_dir for True, from the one at a path for a path, and for
        "auto" from the latest if there is one.

        Ctrl-C and SIGTERM end it after the step under way, with a checkpoint to go on from.
        """
        lock = run_lock(self.output_dir) if is_writer() else contextlib.nullcontext()
        with lock, Interrupts() as interrupts:
            return self._train(resume_from_checkpoint, interrupts)

    def _train(self, resume_from_checkpoint: bool | str | Path | None, interrupts: Interrupts) -> TrainResult:
        args, began = self.args, time.perf_counter()
        enable_compile_cache()
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = find_checkpoint(self.output_dir, resume)
        schedule = self._schedule()
        optimizer = self._optimizer(schedule)
        state = init_train_state(self.model, optimizer, seed=args.seed, gradient_reduction=args.gradient_reduction)
        fingerprint = self._fingerprint()
        progress = Progress()
        if checkpoint:
            state, progress = restore_checkpoint(checkpoint, state, fingerprint)
        step_fn = make_train_step(
            self.model,
            optimizer,
            self.model.mesh,
            gradient_checkpointing=self._checkpointing(),
            loss_fn=self.loss_fn,
            neftune_noise_alpha=args.neftune_noise_alpha,
            gradient_reduction=args.gradient_reduction,
        )
        file = MetricsFile(self.output_dir, progress.step)
        self.log_history = file.records
        console = Console(self.total_steps, progress.step, quiet=args.disable_tqdm or not is_writer())
        chance = math.log(self.model.config.vocab_size) if self.loss_fn is None else None
        run = Run(
            trainer=self,
            step_fn=step_fn,
            recorder=Recorder(file, console, schedule, progress, chance),
            writer=CheckpointWriter(self.output_dir, args.save_total_limit),
            fingerprint=fingerprint,
            callbacks=self._run_callbacks(progress.step),
            interrupts=interrupts,
            agreement=Agreement(self.model.mesh, LAG),
            samples=MetricsFile(self.output_dir, progress.step, SAMPLES_NAME),
        )
        try:
            console.write(self._introduction(checkpoint))
            state = run.to_the_end(state)
            self.model.load_train_state(state)
            self._finish(console)
        finally:
            console.close()
        losses = [record["loss"] for record in self.log_history if "loss" in record]
        return TrainResult(
            global_step=run.recorder.step,
            final_loss=losses[-1] if losses else math.nan,
            num_tokens=run.recorder.num_tokens,
            seconds=time.perf_counter() - began,
            log_history=self.log_history,
        )

    def evaluate(self) -> LogRecord:
        """{"eval_loss", "eval_perplexity"}: the mean loss over the labelled tokens of eval_dataset, and its exponential."""
        return self.evaluate_params(nnx.state(self.model.module, nnx.Param))

    def _run_callbacks(self, step: int) -> Callbacks:
        args = self.args
        patience = args.early_stopping_patience
        stopping = [EarlyStoppingCallback(patience)] if patience else []
        state = TrainerState(step, self.total_steps, 0.0, self.log_history)
        reporters = make_reporters(args.report_to) if is_writer() else []
        members = [*stopping, *self.callbacks, *reporters]
        return Callbacks(members, args, state, TrainerControl(), self.model)

    def _finish(self, console: Console) -> None:
        self.model.save_pretrained(self.output_dir)
        if is_writer():
            plot_loss(self.log_history, self.output_dir / PLOT_NAME, self.model.name)
        wait_for_all("outputs written")
        what = "model" if self.model.lora is None else "adapter"
        console.write(f"saved the {what} in {self.output_dir}, its loss in {self.output_dir / PLOT_NAME}")

    def evaluate_params(self, params: nnx.State) -> LogRecord:
        if not self.eval_rows:
            raise UserError("There is nothing to evaluate on: give SFTTrainer an eval_dataset.")
        loss = tokens = 0.0
        size = self.args.per_device_eval_batch_size * self.devices
        for rows in in_order(self.eval_rows, size, own_rows(self.model.mesh, size)):
            batch = place_batch(rows, self.model.mesh, size)
            loss_sum, count = jax.device_get(self._summed_loss(params, batch))
            loss, tokens = loss + float(loss_sum), tokens + float(count)
        return {"eval_loss": loss / tokens, "eval_perplexity": perplexity(loss / tokens)}

    @cached_property
    def _summed_loss(self) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
        if self.model.mesh is not None and self.loss_fn is None:
            return make_mesh_loss(self.model, self.model.mesh)
        definition, _, frozen = nnx.split(self.model.module, nnx.Param, ...)
        return partial(_summed_loss, definition, self.loss_fn or causal_lm_loss, frozen)

    def placed(self, batch: Batch) -> Batch:
        """A batch of the train source on the mesh."""
        return place_batch(batch, self.model.mesh, self.train_source.batch_size)

    def samples(self, params: nnx.State) -> list[tuple[str, str]]:
        """(prompt, its greedy continuation) of each of eval_prompts."""
        definition, _, frozen = nnx.split(self.model.module, nnx.Param, ...)
        texts = continuations(definition, (params, frozen), self.sample_requests, self.tokenizer)
        return list(zip(self.args.eval_prompts, texts, strict=True))

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
        args, model = self.args, self.model
        lora = {} if model.lora is None else dataclasses.asdict(model.lora)
        return {
            "model": dataclasses.asdict(model.config) | {"dtype": str(model.module.dtype)},
            "lora": {key: value for key, value in lora.items() if key != "random_state"},
            "optim": resolve_name(args.optim),
            "data": self.train_source.identity(),
        }

    def _introduction(self, checkpoint: Path | None) -> str:
        args, source = self.args, self.train_source
        per_step = f"{source.batch_size} rows" + f" x {args.gradient_accumulation_steps}" * (
            args.gradient_accumulation_steps > 1
        )
        epochs = f" ({self.total_steps / source.steps_per_epoch:.2f} epochs)" if source.steps_per_epoch else ""
        lines = [
            f"data: {describe_source(source)}",
            f"run:  {self.total_steps:,} steps of {per_step}{epochs},"
            f" {trainable_parameters(self.model.module):,} trained parameters, {args.optim}, {jax.devices()[0].device_kind}",
        ]
        if checkpoint:
            lines.append(f"resuming from {checkpoint}")
        return "\n".join(lines)


def check_arguments(model: Any, args: Any) -> None:
    """Refuses what trainers elsewhere take for a model and its settings, and settings that the model contradicts."""
    if isinstance(model, str):
        raise UserError(
            f"SFTTrainer takes a model and no name: FastLanguageModel.from_pretrained({model!r}) gives one."
        )
    if not isinstance(args, SFTConfig | None):
        raise UserError(f"SFTTrainer takes args=SFTConfig(...) of fastjax, not a {type(args).__name__}.")
    for name, dtype in (("bf16", jnp.bfloat16), ("fp16", jnp.float16)):
        if getattr(args, name, False) and model.module.dtype != dtype:
            raise UserError(
                f"SFTConfig has {name}=True and the model computes in {jnp.dtype(model.module.dtype)}: load it with"
                f" from_pretrained(dtype={jnp.dtype(dtype).name!r}), or leave {name} out."
            )


@partial(jax.jit, static_argnums=(0, 1))
def _summed_loss(
    definition: nnx.GraphDef, loss_fn: LossFn, frozen: nnx.State, params: nnx.State, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    return loss_fn(nnx.merge(definition, params, frozen), batch)


def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str | None = None, response_part: str | None = None
) -> SFTTrainer:
    """The same trainer, its loss on what the assistant says alone; as `assistant_only_loss` and the two parts in SFTConfig.

    Without the parts the answers are found through the chat template.
    """
    parts = {"instruction_part": instruction_part, "response_part": response_part}
    trainer.args = dataclasses.replace(trainer.args, assistant_only_loss=True, **parts)
    trainer.prepare_data()
    return trainer
