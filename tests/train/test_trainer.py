"""The trainer as its users meet it: it learns, reports, evaluates, resumes bit for bit, and says what is wrong."""

import json
import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastjax import SFTConfig, SFTTrainer
from fastjax.data import Step
from fastjax.errors import UserError
from fastjax.train.checkpoints import Progress, find_checkpoint
from fastjax.train.console import Console
from fastjax.train.loss import causal_lm_loss
from fastjax.train.metrics import MetricsFile
from fastjax.train.recorder import LAG, Recorder

TEXTS = [
    {"text": f"{word} comes {n}, {word} goes." * (1 + n % 3)}
    for n, word in enumerate(["sun", "moon", "rain", "fox"] * 3)
]


def make_trainer(model, output_dir, *, train_dataset=TEXTS, eval_dataset=None, loss_fn=None, **settings) -> SFTTrainer:
    usual = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",  # the quickest to compile
        "lr_scheduler_type": "constant",  # or every length of run would be a program of its own
        "learning_rate": 1.0,
    }
    args = SFTConfig(output_dir=str(output_dir), **usual | settings)
    return SFTTrainer(model=model, train_dataset=train_dataset, eval_dataset=eval_dataset, args=args, loss_fn=loss_fn)


def losses(records) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def without_speed(records) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in ("tokens_per_second", "data_wait")}
        for record in records
    ]


def test_learns_and_leaves_adapter_metrics_and_plot(tiny_model, tmp_path):
    model = tiny_model(modules_to_save=["lm_head"])
    settings = {"optim": "adamw", "learning_rate": 1e-2, "num_train_epochs": 5, "packing": True}
    trainer = make_trainer(model, tmp_path, eval_dataset=TEXTS[:4], **settings)
    before = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    assert result.global_step == trainer.total_steps
    assert result.final_loss < before - 0.5
    assert trainer.evaluate()["eval_loss"] < before - 0.5  # the trained parameters are in the model
    assert load_file(tmp_path / "adapter_model.safetensors")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == result.log_history == trainer.log_history
    assert losses(written)[-1] == (result.global_step, result.final_loss)
    assert written[-1] == {"step": result.global_step, "epoch": 5.0} | trainer.evaluate()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_step_count_and_the_rates_are_those_asked_for(tiny_model, tmp_path):
    settings = {"warmup_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-2, "max_length": 128}
    trainer = make_trainer(tiny_model(), tmp_path, num_train_epochs=1, gradient_accumulation_steps=2, **settings)
    records = trainer.train().log_history
    assert trainer.total_steps == 3  # 12 rows, 4 a step
    np.testing.assert_allclose([record["learning_rate"] for record in records], [0, 5e-3, 1e-2], rtol=1e-6)
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1])
    tokens = sum(len(record["text"]) + 1 for record in TEXTS)
    assert records[-1]["num_tokens"] == tokens
    assert all(record["tokens_per_second"] > 0 and record["grad_norm"] > 0 for record in records)
    assert make_trainer(tiny_model(), tmp_path, num_train_epochs=1, max_steps=7).total_steps == 7


def test_a_record_covers_the_tokens_of_its_steps(tiny_model, tmp_path):
    settings = {"max_steps": 5, "eval_dataset": TEXTS}
    each = make_trainer(tiny_model(), tmp_path / "a", **settings).train().log_history
    both = make_trainer(tiny_model(), tmp_path / "b", logging_steps=2, **settings).train().log_history
    assert [step for step, _ in losses(both)] == [2, 4, 5]
    tokens = np.diff([0] + [record["num_tokens"] for record in each[:5]]) - 2  # a row's first token has no label
    first = np.average([loss for _, loss in losses(each)][:2], weights=tokens[:2])
    assert losses(both)[0][1] == pytest.approx(first, rel=1e-6)
    assert losses(both)[2] == losses(each)[4]


def test_packing_changes_neither_loss_nor_gradient(tiny_model, tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": len(TEXTS), "max_length": 128}
    apart = make_trainer(tiny_model(), tmp_path / "a", **settings).train().log_history[0]
    packed_trainer = make_trainer(tiny_model(), tmp_path / "b", packing=True, **settings)
    assert len(packed_trainer.train_source.rows) < len(TEXTS) / 2
    packed = packed_trainer.train().log_history[0]
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-4)


def test_evaluation_is_the_mean_over_labelled_tokens(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    rows = [{"prompt": "the fox ", "completion": "runs far away"}, {"prompt": "it ", "completion": "is"}]
    total, count = 0.0, 0
    for row in rows:
        prompt = tiny_tokenizer(row["prompt"])["input_ids"]
        ids = np.array([prompt + tiny_tokenizer(row["completion"])["input_ids"] + [tiny_tokenizer.eos_token_id]])
        log_p = jax.nn.log_softmax(model(ids).astype(jnp.float32))[0]
        total -= sum(float(log_p[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
        count += ids.shape[1] - len(prompt)
    for settings in ({}, {"packing": True}, {"per_device_eval_batch_size": 1}):
        found = make_trainer(model, tmp_path, eval_dataset=rows, **settings).evaluate()
        assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_evaluates_every_eval_steps(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=5, eval_steps=2, eval_dataset=TEXTS[:2])
    records = [record for record in trainer.train().log_history if "eval_loss" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    assert records[0]["eval_loss"] > records[-1]["eval_loss"]


RESUMABLE = {
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 3,  # the checkpoint falls into the middle of a record
    "gradient_accumulation_steps": 2,
    "packing": True,
    "eval_steps": 2,
    "eval_dataset": TEXTS[:2],
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-2,
    "optim": "adamw_8bit",
}


@pytest.fixture(scope="module")
def resumable_model(tiny_model):
    """Dropout makes a run depend on the random key; the head is large enough for moments in 8 bits."""
    return partial(tiny_model, lora_dropout=0.2, modules_to_save=["lm_head"])


@pytest.fixture(scope="module")
def uninterrupted(resumable_model, tmp_path_factory):
    """(output_dir, result) of a whole run."""
    directory = tmp_path_factory.mktemp("whole")
    result = make_trainer(resumable_model(), directory, **RESUMABLE).train()
    assert [step for step, _ in losses(result.log_history)] == [3, 6, 8]
    return directory, result


class Killed(Exception):
    """Stands for a kill of the process."""


@pytest.fixture(scope="module")
def killed(resumable_model, tmp_path_factory):
    """The output_dir of a run killed in step 7, past its checkpoint of step 4."""
    directory = tmp_path_factory.mktemp("killed")

    def kill(self, metrics, data, add=Recorder.add):
        add(self, metrics, data)
        if self.step + len(self.pending) == 7:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "add", kill)
        with pytest.raises(Killed):
            make_trainer(resumable_model(), directory, **RESUMABLE).train()
    assert not (directory / "adapter_model.safetensors").exists()
    assert json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    return directory


@pytest.mark.parametrize("way", ["latest", "path", "setting", "auto"])
def test_resuming_is_bit_identical(resumable_model, tmp_path, uninterrupted, killed, way):
    whole_dir, whole = uninterrupted
    directory = shutil.copytree(killed, tmp_path / "resumed")
    settings = RESUMABLE | {"resume_from_checkpoint": way == "setting"}
    resume = {"latest": True, "path": directory / "checkpoint-4", "setting": None, "auto": "auto"}[way]
    result = make_trainer(resumable_model(), directory, **settings).train(resume)
    assert without_speed(result.log_history) == without_speed(whole.log_history)
    assert result.num_tokens == whole.num_tokens
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (directory / name).read_bytes() == (whole_dir / name).read_bytes()


def test_a_run_over_the_checkpoints_of_another_is_refused(tiny_model, uninterrupted):
    directory, _ = uninterrupted
    with pytest.raises(UserError, match="checkpoint-8 lies past the step this run starts from: continue it with"):
        make_trainer(tiny_model(), directory, **RESUMABLE).train()
    with pytest.raises(UserError, match="checkpoint-8 lies past the step"):
        make_trainer(tiny_model(), directory, **RESUMABLE).train(directory / "checkpoint-4")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"r": 8}, {}, r"checkpoint-8 was saved with lora\.r=4 and this run has 8: resume with the same model, LoRA"),
        (
            {"target_modules": ["q_proj"]},
            {},
            r"saved with lora\.target_modules=all-linear and this run has \['q_proj'\]",
        ),
        ({"intermediate_size": 32}, {}, r"saved with model\.intermediate_size=64 and this run has 32"),
        ({}, {"optim": "lion"}, "saved with optim=adamw_8bit and this run has lion"),
        ({}, {"seed": 1}, r"saved with data\.seed=3407 and this run has 1"),
        ({}, {"per_device_train_batch_size": 1}, r"saved with data\.rows_per_step=4 and this run has 2"),
        ({}, {"train_dataset": [*TEXTS[:-1], {"text": TEXTS[-1]["text"].upper()}]}, r"saved with data\.checksum="),
    ],
)
def test_resuming_another_run_is_refused(resumable_model, uninterrupted, model, settings, message):
    directory, _ = uninterrupted
    with pytest.raises(UserError, match=message):
        make_trainer(resumable_model(**model), directory, **RESUMABLE | settings).train(True)


def test_resuming_from_nothing(tiny_model, tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        make_trainer(tiny_model(), tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"x is not a checkpoint, it has no trainer_state\.json"):
        make_trainer(tiny_model(), tmp_path).train(resume_from_checkpoint=tmp_path / "x")


def test_ten_steps_that_are_not_finite_stop_the_run(tiny_model, tmp_path):
    def broken(model, batch):
        loss, tokens = causal_lm_loss(model, batch)
        return loss * jnp.nan, tokens

    trainer = make_trainer(tiny_model(), tmp_path, max_steps=30, loss_fn=broken)
    with pytest.raises(UserError, match="stopped at step 10: the gradients of 10 steps in a row were not finite"):
        trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [None] * 9  # NaN is no JSON
    assert all(record["skipped"] == 1 for record in records)


def test_full_finetuning_saves_the_model(tiny_model, tmp_path):
    result = make_trainer(tiny_model(r=0), tmp_path, max_steps=2).train()
    assert result.global_step == 2
    assert "model.embed_tokens.weight" in load_file(tmp_path / "model.safetensors")


def test_an_empty_data_set(tiny_model, tmp_path):
    with pytest.raises(UserError, match="train_dataset is empty: give at least one record"):
        make_trainer(tiny_model(), tmp_path, train_dataset=[])
    with pytest.raises(UserError, match=r"train_dataset is empty: all its 1 records were left out, the first .* row 0"):
        make_trainer(tiny_model(), tmp_path, train_dataset=[{"text": 1}], bad_rows="drop")
    with pytest.raises(UserError, match="train_dataset is a stream, which has no length: say with max_steps"):
        make_trainer(tiny_model(), tmp_path, train_dataset=iter(()))
    with pytest.raises(UserError, match="the training data is empty"):
        make_trainer(tiny_model(), tmp_path, train_dataset=iter(()), max_steps=3).train()


def test_a_tokenizer_of_another_model(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"train_dataset has token .*, beyond the model's vocabulary of 64"):
        make_trainer(tiny_model(vocab_size=64), tmp_path)


def test_no_evaluation_data(tiny_model, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate on"):
        make_trainer(tiny_model(), tmp_path).evaluate()


def test_metrics_are_fetched_behind_the_steps(tmp_path):
    fetched = []

    class OnDevice:
        """A metric that notes when it is fetched."""

        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            fetched.append(self.step)
            return np.zeros(())

    recorder = Recorder(MetricsFile(tmp_path, 0), Console(9, 0, quiet=True), lambda step: 0.1, Progress())
    names = ("loss", "grad_norm", "tokens", "skipped", "skipped_in_row")
    for step in range(1, 8):
        recorder.add({name: OnDevice(step) for name in names}, Step({}, 5, {"step": step}, step / 9))
        assert max(fetched, default=0) == max(0, step - LAG)
    recorder.log()
    assert max(fetched) == 7
    assert recorder.num_tokens == 35
