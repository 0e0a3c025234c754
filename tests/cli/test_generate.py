"""`fastjax generate` and `fastjax chat` as someone at a terminal meets them."""

import io
import json
from pathlib import Path

import pytest

from fastjax import FastLanguageModel
from fastjax.cli import main

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


@pytest.fixture
def base(run: Path) -> Path:
    """The tiny model's directory, with a chat template."""
    file = run.parent / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": PLAIN}))
    return run.parent / "base"


def options(base: Path, *more: str) -> list[str]:
    return ["--model", str(base), "--dtype", "float32", "--max-new-tokens", "8", *more]


def expected(base: Path, prompt: str, **settings) -> str:
    model, tokenizer = FastLanguageModel.from_pretrained(base, dtype="float32", progress=False)
    ids = tokenizer(prompt)["input_ids"]
    row = model.generate([ids], max_new_tokens=8, **settings)[0]
    return tokenizer.decode(row[len(ids) :], skip_special_tokens=True)


def test_generate_goes_on_from_the_prompt(base: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    text = expected(base, "number")
    assert main(["generate", *options(base, "--prompt", "number")]) == 0
    assert capsys.readouterr().out == f"number{text}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("number"))
    assert main(["generate", *options(base, "--prompt", "-", "--temperature", "2", "--seed", "5")]) == 0
    assert capsys.readouterr().out == f"number{expected(base, 'number', temperature=2.0, seed=5)}\n"
    assert main(["generate", *options(base, "--prompt", "number", "--chat")]) == 0
    assert capsys.readouterr().out == f"{expected(base, '[user]number;[a]')}\n"


def test_an_adapter_is_put_on_the_model(base: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(run), "train.learning_rate=1.0"]) == 0
    capsys.readouterr()
    texts = []
    for model in (options(base), options(base, "--adapter", str(run.parent / "out")), options(run.parent / "out")):
        assert main(["generate", *model, "--prompt", "number"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] == texts[2]


def test_an_export_says_what_the_adapter_says(base: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(run), "train.learning_rate=1.0", "model.load_in_4bit=false"]) == 0
    merged = str(run.parent / "merged")
    assert main(["export", "--model", str(run.parent / "out"), "--out", merged]) == 0
    capsys.readouterr()
    texts = []
    for model in (str(run.parent / "out"), merged):
        arguments = ["--model", model, "--dtype", "float32", "--16bit", "--max-new-tokens", "4", "--prompt", "number"]
        assert main(["generate", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["export", "--model", str(run.parent / "out"), "--out", merged]) == 2
    assert "merged is not empty" in capsys.readouterr().err
    assert main(["export", "--model", str(run.parent / "out"), "--out", str(run)]) == 2
    assert "is a file): give a place that can be written to" in capsys.readouterr().err


def test_a_conversation(base: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    said = iter(["one", "", "two", "/reset", "three", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", *options(base, "--system", "Be kind.")]) == 0
    first = expected(base, "[system]Be kind.;[user]one;[a]")
    second = expected(base, f"[system]Be kind.;[user]one;[assistant]{first};[user]two;[a]")
    third = expected(base, "[system]Be kind.;[user]three;[a]")
    assert capsys.readouterr().out.split("\n", 1)[1] == f"{first}\n{second}\n{third}\n"


def test_ctrl_c_stops_an_answer_and_then_the_program(base: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    said = iter(["one", KeyboardInterrupt])

    def type_in(prompt: str) -> str:
        word = next(said)
        if isinstance(word, str):
            return word
        raise word

    def interrupted(self, prompt, **settings):
        yield "half an "
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(FastLanguageModel, "stream", interrupted)
    assert main(["chat", *options(base)]) == 0
    assert "half an \n" in capsys.readouterr().out


def test_a_conversation_past_the_context_can_be_reset(base: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    said = iter(["a" * 3000, "one", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", *options(base)]) == 0
    shown = capsys.readouterr()
    assert "leaves no room in the model's context of 2048" in shown.err
    assert expected(base, "[user]one;[a]") in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a" * 3000], "leaves no room in the model's context of 2048: shorten it"),
        (["--prompt", "a", "--top-p", "7"], "top_p=7.0 is not valid"),
        (["--prompt", "a", "mesh.tensor=2"], "mesh axis tensor=2 does not divide the model's num_key_value_heads = 1"),
        (["mesh.data=0", "--prompt", "a"], "'data' in section 'mesh' must be a whole number of devices, found 0"),
        (["--prompt", "a", "train.seed=2"], "'train.seed=2' has no meaning here: only mesh.AXIS=N has"),
    ],
)
def test_what_cannot_be_generated(base: Path, arguments: list[str], message: str, capsys) -> None:
    assert main(["generate", *options(base, *arguments)]) == 2
    assert message in capsys.readouterr().err


def test_chat_without_a_template(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", *options(run.parent / "base")]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_chat_with_a_template_that_refuses(base: Path, capsys: pytest.CaptureFixture) -> None:
    file = base / "tokenizer_config.json"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": refusing}))
    assert main(["chat", *options(base, "--system", "Be kind.")]) == 2
    assert (
        "fastjax: the tokenizer's chat template takes no such conversation: no system role." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--top-p", "top_p=7.0 is not valid"),
        ("--max-new-tokens", "max_new_tokens=-7 must be at least 1"),
        ("--prompt-lookup", "prompt_lookup_num_tokens=77 must be between 1 and 31"),
    ],
)
def test_chat_with_a_setting_that_is_not_valid(base: Path, capsys, setting: str, message: str) -> None:
    """Told before anyone has typed a word."""
    value = message.split("=")[1].split(" ")[0]
    assert main(["chat", *options(base, setting, value)]) == 2
    assert message in capsys.readouterr().err
