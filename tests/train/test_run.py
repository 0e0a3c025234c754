"""A run from outside: callbacks, what stops it, where it can go on, and what it leaves behind."""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import types
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax import (
    EarlyStoppingCallback,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    make_mesh,
    train_on_responses_only,
)
from fastjax.errors import UserError
from fastjax.models.draws import places_of
from fastjax.models.llama import embedding_noise, example_lengths
from fastjax.train.checkpoints import list_checkpoints
from fastjax.train.interrupts import Interrupted
from fastjax.train.run_lock import run_lock

TEXTS = [{"text": f"{word} comes {n}." * (1 + n % 3)} for n, word in enumerate(["sun", "moon", "rain", "fox"] * 3)]


def make_trainer(model, output_dir, *, train_dataset=TEXTS, eval_dataset=None, callbacks=(), **settings) -> SFTTrainer:
    usual = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "max_steps": 4,
        "save_steps": 0,
        "max_length": 64,
        "packing": True,
    }
    args = SFTConfig(output_dir=str(output_dir), **usual | settings)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return SFTTrainer(model=model, args=args, callbacks=callbacks, **data)


def losses(result_or_trainer) -> list[float]:
    return [record["loss"] for record in result_or_trainer.log_history if "loss" in record]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Spy(TrainerCallback):
    """Notes its calls; `at` maps (event, step) to what it sets in the control."""

    def __init__(self, at=None):
        self.calls, self.at = [], at or {}

    def note(self, event, state, control, **kwargs):
        self.calls.append((event, state.global_step))
        for name in self.at.get((event, state.global_step), ()):
            setattr(control, name, True)

    def __getattribute__(self, name):
        if name.startswith("on_"):
            note = object.__getattribute__(self, "note")
            return lambda args, state, control, **kwargs: note(name, state, control, **kwargs)
        return object.__getattribute__(self, name)


def test_callbacks_are_called_at_their_turns(tiny_model, tmp_path):
    spy = Spy()
    make_trainer(
        tiny_model(), tmp_path, max_steps=2, eval_dataset=TEXTS[:2], eval_steps=2, save_steps=2, callbacks=[spy]
    ).train()
    events = ["on_step_begin", "on_step_end", "on_log"]
    expected = [("on_train_begin", 0), *((e, 0 if e == "on_step_begin" else 1) for e in events)]
    expected += [*((e, 1 if e == "on_step_begin" else 2) for e in events), ("on_log", 2), ("on_evaluate", 2)]
    assert spy.calls == [*expected, ("on_save", 2), ("on_train_end", 2)]


def test_callbacks_steer_the_run(tiny_model, tmp_path):
    spy = Spy(
        {
            ("on_step_end", 1): ["should_save"],
            ("on_step_end", 2): ["should_log", "should_evaluate"],
            ("on_step_end", 3): ["should_training_stop"],
        }
    )
    settings = {"logging_steps": 100, "max_steps": 50}
    result = make_trainer(tiny_model(), tmp_path, eval_dataset=TEXTS[:2], callbacks=[spy], **settings).train()
    assert result.global_step == 3
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert [(r["step"], "loss" in r) for r in result.log_history] == [(2, True), (2, False), (3, True), (3, False)]
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="callback 5 is none: derive its class"):
        make_trainer(tiny_model(), tmp_path, callbacks=[5])


def judged(values):
    """An evaluation that finds these losses one after the other."""
    found = iter(values)
    return lambda self, params: {"eval_loss": (loss := next(found)), "eval_perplexity": math.exp(loss)}


def test_early_stopping_and_the_best_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "evaluate_params", judged([3.0, 2.0, 2.5, 2.0, 9.0]))
    settings = {"max_steps": 50, "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, eval_dataset=TEXTS[:2], save_steps=1, save_total_limit=1, **settings)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept[state.global_step] = state.global_step

    trainer.callbacks.append(Keep())
    result = trainer.train()
    assert result.global_step == 4  # two evaluations in a row without a lower loss
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    two = make_trainer(tiny_model(), tmp_path / "two", max_steps=2).train()
    assert losses(two) == losses(result)[:2]
    from safetensors.numpy import load_file

    best, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "two"))
    for name, array in second.items():
        np.testing.assert_array_equal(best[name], array)


def test_what_judging_needs(tiny_model, tmp_path):
    with pytest.raises(UserError, match="early_stopping_patience need an eval_dataset"):
        make_trainer(tiny_model(), tmp_path, early_stopping_patience=1)
    with pytest.raises(UserError, match="early_stopping_patience=0 must be at least 1"):
        EarlyStoppingCallback(0)


@pytest.mark.parametrize("received", [signal.SIGINT])  # SIGTERM: tests/distributed/test_processes.py
def test_a_signal_ends_the_step_saves_and_stops(tiny_model, tmp_path, received):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), received)

    settings = {"logging_steps": 3, "learning_rate": 1.0, "eval_dataset": TEXTS[:2]}
    whole = make_trainer(tiny_model(), tmp_path / "whole", **settings).train()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"after step 2; .* holds its checkpoint: go on with") as stop:
        make_trainer(tiny_model(), tmp_path / "cut", callbacks=[Signal()], **settings).train()
    assert stop.value.exit_code == 128 + received
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    assert not any("data" in thread.name for thread in threading.enumerate())
    for place in ("cut", "cut/checkpoint-2"):
        with pytest.raises(UserError, match="has what a run goes on from, and no adapter: load its output_dir"):
            FastLanguageModel.from_pretrained(tmp_path / place)
    again = make_trainer(tiny_model(), tmp_path / "cut", **settings).train(True)
    assert losses(again) == losses(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_in_the_same_directory_is_refused(tiny_model, tmp_path):
    with run_lock(tmp_path), pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()}\)"):
        make_trainer(tiny_model(), tmp_path).train()
    make_trainer(tiny_model(), tmp_path, max_steps=1).train()


def test_divergence_is_told(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model(modules_to_save=["lm_head"]), tmp_path, max_steps=60, learning_rate=1e3)
    with pytest.raises(UserError, match=r"it has diverged, with a loss of .* above 5\.61, .* lower learning_rate"):
        trainer.train()


def test_a_failed_write_leaves_the_last_good_checkpoint(tiny_model, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    real = ocp.StandardCheckpointer.close

    def full(self):
        real(self)
        if list_checkpoints(tmp_path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "close", full)
    with pytest.raises(UserError, match=r"checkpoint-2 could not be written \(.*No space left .*checkpoint-1 is whole"):
        make_trainer(tiny_model(), tmp_path, save_steps=1).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    monkeypatch.undo()
    again = make_trainer(tiny_model(), tmp_path, save_steps=1).train(True)
    assert again.global_step == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_without_room_for_a_checkpoint(tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"checkpoint-1 could not be written \(it takes .* and the disk has 0\.0\): make room"
    ):
        make_trainer(tiny_model(), tmp_path, save_steps=1).train()


def test_steps_go_on_while_a_checkpoint_is_written(tiny_model, tmp_path, monkeypatch):
    """And what is written is the state of its step, though the steps after it have overwritten the arrays."""
    import orbax.checkpoint as ocp

    real, released, seen = ocp.StandardCheckpointer.close, threading.Event(), []

    def slow(self):
        if threading.current_thread() is not threading.main_thread():
            released.wait(60)
        real(self)

    class Release(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                seen.append(list(tmp_path.glob("*/checkpoint-1")))
                released.set()

    monkeypatch.setattr(ocp.StandardCheckpointer, "close", slow)
    settings = {"learning_rate": 1.0, "save_total_limit": 1}
    save_first = Spy({("on_step_end", 1): ["should_save"]})
    whole = make_trainer(tiny_model(), tmp_path / "a", callbacks=[save_first, Release()], **settings).train()
    assert seen == [[]]
    assert len(list_checkpoints(tmp_path / "a")) == 1
    again = make_trainer(tiny_model(), tmp_path / "a", **settings).train(True)
    assert losses(again) == losses(whole)


def test_a_stream_trains_and_resumes(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastjax.data.stream.WINDOW_STEPS", 2)
    monkeypatch.setattr("fastjax.data.tokenize.BATCH", 4)
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(TEXTS * 3).to_iterable_dataset()
    settings = {"train_dataset": stream, "max_steps": 6, "save_steps": 3, "learning_rate": 1.0}
    whole = make_trainer(tiny_model(), tmp_path / "whole", **settings).train()
    make_trainer(tiny_model(), tmp_path / "cut", **settings | {"max_steps": 3}).train()
    again = make_trainer(tiny_model(), tmp_path / "cut", **settings).train(True)
    assert losses(again) == losses(whole)
    monkeypatch.undo()
    make_trainer(tiny_model(), tmp_path / "other", **settings | {"max_steps": 3}).train()
    settings["train_dataset"] = iter([{"text": "x" * n} for n in range(3, 60)])
    with pytest.raises(UserError, match="the training data has changed since the checkpoint"):
        make_trainer(tiny_model(), tmp_path / "other", **settings).train(True)


def test_tensorboard_gets_what_the_log_gets(tiny_model, tmp_path):
    pytest.importorskip("tensorboardX")
    result = make_trainer(tiny_model(), tmp_path, max_steps=2, report_to="tensorboard").train()
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401  (the format's own checksum; its presence suffices)

    (file,) = (tmp_path / "runs").iterdir()
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):  # length, its checksum, the event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + size
    for record in result.log_history:
        assert found[record["step"], "train/loss"] == pytest.approx(record["loss"])


def test_wandb_gets_what_the_log_gets(tiny_model, tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = lambda **settings: logged.append(settings["name"]) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    make_trainer(tiny_model(), tmp_path, max_steps=1, report_to=["wandb"], run_name="mine").train()
    assert logged[0] == "mine"
    assert logged[1][0] == 1
    assert {"train/loss", "train/learning_rate"} <= set(logged[1][1])
    assert logged[2] == "end"


def test_a_report_that_is_not_installed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to='wandb' needs wandb: pip install 'fastjax\[wandb\]'"):
        make_trainer(tiny_model(), tmp_path, report_to="wandb").train()


def test_continuations_of_prompts_at_each_evaluation(tiny_model, tmp_path):
    """On a mesh, of whose devices each has its own rows and heads: what one device says with the trained adapter."""
    settings = {"eval_prompts": ["sun", "fox é"], "eval_max_new_tokens": 3, "eval_steps": 2, "eval_dataset": TEXTS[:2]}
    trainer = make_trainer(tiny_model(mesh=make_mesh(data=2, tensor=2)), tmp_path, learning_rate=3.0, **settings)
    trainer.train()
    records = lines(tmp_path / "samples.jsonl")
    assert [(record["step"], record["prompt"]) for record in records] == [
        (step, prompt) for step in (2, 4) for prompt in ("sun", "fox é")
    ]
    alone = tiny_model()
    nnx.update(alone.module, jax.tree.map(np.asarray, nnx.state(trainer.model.module, nnx.Param)))
    said = [
        alone.tokenizer.decode(alone.generate([alone.tokenizer(prompt)["input_ids"]], 3)[0])
        for prompt in settings["eval_prompts"]
    ]
    assert [record["prompt"] + record["completion"] for record in records[2:]] == said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_prompts": ["sun"]}, "eval_prompts are continued at every evaluation, which takes an eval_dataset"),
        (
            {"eval_prompts": ["sun " * 3000], "eval_dataset": TEXTS[:2]},
            "eval_prompts: 'sun sun .* cannot be continued: a prompt of .* tokens leaves no room in the model's context",
        ),
    ],
)
def test_prompts_that_cannot_be_continued(tiny_model, tmp_path, settings, message):
    """Told before anything is trained."""
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_model(), tmp_path, **settings)


def test_neftune_noise():
    x = jnp.zeros((2, 12, 64))
    segments = jnp.asarray([[1] * 3 + [2] * 9, [1] * 12], jnp.int32)
    noise = embedding_noise(jax.random.key(0), 5.0, x, example_lengths(segments), places_of(*segments.shape))
    for row, span, tokens in ((0, slice(0, 3), 3), (0, slice(3, 12), 9), (1, slice(0, 12), 12)):
        bound = 5.0 / math.sqrt(tokens * 64)
        part = np.abs(noise[row, span])
        assert 0.95 * bound < part.max() <= bound
        assert part.mean() == pytest.approx(bound / 2, rel=0.1)


def test_neftune_is_for_training_alone(tiny_model, tmp_path):
    settings = {"max_steps": 1, "eval_dataset": TEXTS[:4]}
    plain = make_trainer(tiny_model(), tmp_path / "a", **settings)
    noisy = make_trainer(tiny_model(), tmp_path / "b", neftune_noise_alpha=50.0, **settings)
    assert plain.evaluate() == noisy.evaluate()
    assert losses(plain.train())[0] != losses(noisy.train())[0]


@pytest.mark.parametrize(
    ("settings", "evaluated", "saved"),
    [
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [2, 4, 5], [2, 4]),
        ({"eval_strategy": "steps", "logging_steps": 2, "save_steps": 3}, [2, 4, 5], [3]),
        ({"eval_strategy": "no", "eval_steps": 1, "save_strategy": "no", "save_steps": 1}, [], []),
    ],
)
def test_strategies(tiny_model, tmp_path, settings, evaluated, saved):
    data = {"train_dataset": TEXTS[:4], "eval_dataset": TEXTS[:2], "packing": False, "max_steps": 5}
    trainer = make_trainer(tiny_model(), tmp_path, **data, **settings)
    records = trainer.train().log_history
    assert [record["step"] for record in records if "eval_loss" in record] == evaluated
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == saved


def test_epochs_of_a_stream(tiny_model, tmp_path):
    with pytest.raises(UserError, match="save_strategy='epoch' needs a data set with a length"):
        make_trainer(tiny_model(), tmp_path, train_dataset=iter(TEXTS), save_strategy="epoch")


def test_responses_only(tiny_model, tmp_path):
    rows = [{"text": "Q: sun A: moon"}, {"text": "Q: rain A: fox"}]
    trainer = make_trainer(tiny_model(), tmp_path, train_dataset=rows)
    assert train_on_responses_only(trainer, instruction_part="Q:", response_part="A:") is trainer
    learnt = [[label for label in example["labels"] if label >= 0] for example in trainer.train_dataset]
    assert trainer.tokenizer.batch_decode(learnt) == [" moon</s>", " fox</s>"]
    assert trainer.tokenizer.decode(trainer.train_dataset[-1:][0]["input_ids"]) == "Q: rain A: fox</s>"
    assert all(math.isfinite(loss) for loss in losses(trainer.train()))


def test_the_loader_is_ahead_of_the_steps(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path)
    records = [record for record in trainer.train().log_history if "data_wait" in record]
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    first = [step.batch["input_ids"] for step in islice(trainer.train_source.steps(), 2)]
    assert first[0].shape == (2, 64)


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_is_compiled_twice(tiny_model, tmp_path, packing):
    """Packed rows are one program; rows in buckets one a bucket, all of them in the first epoch."""
    compiled, at_step = [], {}

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            at_step[state.global_step] = len(compiled)

    rows = [{"text": "a" * size} for size in (10, 30, 62, 70, 90, 120)] * 2
    trainer = make_trainer(
        tiny_model(), tmp_path, train_dataset=rows, packing=packing, max_length=128, max_steps=30, callbacks=[Count()]
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    first_epoch = 2 if packing else trainer.train_source.steps_per_epoch
    assert at_step[first_epoch] > 0
    assert at_step[30] == at_step[first_epoch]
