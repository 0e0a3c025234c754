"""The command line: a run from its YAML file to its adapter, and mistakes told in one line."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import fastjax
from fastjax import FastLanguageModel
from fastjax.cli import main, make_parser, plan
from fastjax.cli.config import load_run_config
from fastjax.errors import UserError
from fastjax.train.room import Room


def test_a_run_from_yaml_to_adapter(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(run), "lora.r=4", "train.learning_rate=1e-3"]) == 0
    out = run.parent / "out"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert (out / "loss.png").stat().st_size > 1000
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    model, tokenizer = FastLanguageModel.from_pretrained(out, dtype="float32", progress=False)
    assert model.lora is not None
    assert model.lora.r == 4
    assert tokenizer.eos_token_id == 1
    assert not (out / "samples.jsonl").exists()
    shown = capsys.readouterr()
    assert "step 3/3" in shown.out
    assert "loading weights" not in shown.err  # a bar is for terminals


def test_a_file_of_settings_is_all_that_is_missing(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("required: CONFIG.yaml\n")


def test_its_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastjax {fastjax.__version__}\n"


def test_every_option_has_its_help() -> None:
    (commands,) = (each for each in make_parser()._actions if isinstance(each.choices, dict))
    assert commands.choices is not None
    for command in commands.choices.values():
        assert not [action.dest for action in command._actions if not action.help]


def test_a_plan_before_anything_is_loaded(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent / "base" / "model.safetensors").unlink()
    assert main(["plan", str(run), "--memory", "0.001", "train.per_device_train_batch_size=1"]) == 0
    printed = capsys.readouterr().out
    assert "1 x 32 tokens a device" in printed
    assert "1 layers none" in printed
    overrides = ["train.per_device_train_batch_size=4096", "mesh.context=2"]
    assert main(["plan", str(run), *overrides, "--memory", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "4096 x 32 tokens / 2 a device" in printed
    assert "halve per_device_train_batch_size" in printed
    for words, told in {
        "train.gradient_reduction=4bit": "one device has nothing to send",
        "mesh.fsdp=3": "cannot be split evenly",
        "--memory=-1": "--memory -1 must be",
    }.items():
        assert main(["plan", str(run), words]) == 2
        assert told in capsys.readouterr().err
    counted = []
    monkeypatch.setattr(plan, "gib", lambda size: counted.append(size) or "")
    for reduction in ("full", "4bit"):
        assert main(["plan", str(run), "mesh.data=8", f"train.gradient_reduction={reduction}"]) == 0
    assert len(counted) % 2 == 0
    full, codes = counted[: len(counted) // 2], counted[len(counted) // 2 :]
    assert sum(codes) > sum(full)
    run.write_text(run.read_text().replace("lora: {r: 2}", ""))
    assert main(["plan", str(run)]) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_what_cannot_fit_is_told_before_anything_is_loaded(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows of any length, where they are not packed; and by `plan` with what would do."""
    monkeypatch.setattr("fastjax.cli.train.find_room", lambda mesh: Room(device=1 << 20, host=1 << 30))
    (run.parent / "base" / "model.safetensors").unlink()
    huge = ["train.per_device_train_batch_size=4096"]
    assert main(["train", str(run), *huge]) == 2
    assert "fastjax: a step needs at least" in capsys.readouterr().err
    assert main(["plan", str(run), *huge, "--memory", "0.001"]) == 0
    changes = capsys.readouterr().out.splitlines()[-1].partition("fit by itself: ")[2].split(", ")
    assert len(changes) > 0
    for change in changes:
        words = [change if change.startswith("mesh") else f"train.{change}", "--memory", "0.001"]
        assert main(["plan", str(run), *huge, *words]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("  auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rank=4"], "rank"),
        (["train.learning_rat=1"], "learning_rate"),
        (["train.lr=1"], "section 'train' takes no lr: it is called learning_rate here."),
        (["train.optim=adamx"], "adamx"),
        (
            ["lora.use_gradient_checkpointing=some", "model.model_name=./nowhere"],
            "gradient_checkpointing='some' is unknown",
        ),
        (["trian.optim=sgd"], "train"),
        (["learning_rate"], "section.key=value"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["train.output_dir=/dev/null/out"], "/dev/null/out cannot be written (/dev/null is a file)"),
        (["model.model_name=./nowhere"], "nowhere"),
        (["lora.target_modules=[query]"], "q_proj"),
        (["--processes", "2", "--process", "0"], "--coordinator must be given too"),
        (["--coordinator", "localhost:1", "--processes", "1", "--process", "0"], "could not join the others"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(run), *arguments]) == 2
    complaint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastjax: ")]
    assert len(complaint) == 1
    assert message in complaint[0]
    assert "Traceback" not in complaint[0]
    assert not (run.parent / "out").exists()


def test_ctrl_c_exits_with_130(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastjax.cli.train.load_datasets", interrupt)
    assert main(["train", str(run)]) == 130


def test_a_bug_is_not_taken_for_a_mistake(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjax.cli.train.load_datasets", lambda config, read: jnp.zeros(2).reshape(3))
    with pytest.raises(TypeError):
        main(["train", str(run)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- model", "expected the sections"),
        ("model: {model_name: a}\nmodel: {model_name: b}", "given twice"),
        ("model: {model_name: a}", "needs 'path'"),
        ("modle: {model_name: a}", "model"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_run_config(tmp_path / "run.yaml")


def test_data_shows_what_the_model_will_see(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run.parent / "data.jsonl").write_text(
        '{"prompt": "two and ", "completion": "three"}\n{"prompt": 5, "completion": "six"}\n{"text": "seven"}\n'
    )
    (run.parent / "base" / "model.safetensors").unlink()  # no weights are needed
    assert main(["data", str(run), "data.bad_rows=drop", "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "data.jsonl: 3 records" in printed
    assert "examples  2; 0 cut to 32 tokens, 0 split, 1 records left out" in printed
    assert "data.jsonl, line 2, column 'prompt': expected a string, found 5 (int)" in printed
    assert "tokens    20 an epoch, 60.0% of them learnt" in printed
    assert "rows      1 of up to 32 tokens, 62.5% full; 1 steps of 2 rows an epoch" in printed
    assert "two and {+three</s>+}" in printed
    assert "s{+even</s>+}" in printed  # nothing predicts the first token
    assert (run.parent / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", str(run), "data.bad_rows=drop", "data.streaming=true", "train.max_steps=1"]) == 0
    assert "3 records, the beginning of a stream" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"text": "a"}\n{"text": }\n', [], "data.jsonl, line 2: malformed JSON"),
        ('{"text": "a"}\n{"text": 7}\n', [], "data.jsonl, line 2, column 'text': expected a string, found 7 (int)"),
        ("\n", [], "data.jsonl' holds no records"),
        (
            '{"text": "' + "a" * 50 + '"}\n',
            ["data.overlong=error"],
            "line 1: its 51 tokens are more than max_length=32",
        ),
        ('{"text": "a"}\n', ["data.streaming=yes", "train.max_steps=-1"], "say with max_steps how long to train"),
        ('{"messages": []}\n', [], "data.jsonl, line 1, column 'messages': expected a list of messages"),
    ],
)
def test_faults_in_data_are_told_in_one_line(
    content: str, settings: list[str], message: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    (run.parent / "data.jsonl").write_text(content)
    for command in ("data", "train"):
        assert main([command, str(run), *settings]) == 2
        complaint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastjax: ")]
        assert len(complaint) == 1
        assert message in complaint[0]
