"""The demo in small: its parts, its judgement, and one whole run with a fresh process at the end."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastjax.demo.settings import Settings
from fastjax.demo.stages import Outcome, run
from fastjax.demo.tokenizer import train_tokenizer
from fastjax.demo.world import RELATIONS, World

SMALL = Settings(
    countries=12,
    held_out=3,
    passages=1200,
    vocab_size=400,
    num_layers=2,
    base_steps=200,
    row_length=64,
    base_learning_rate=8e-3,
    tune_steps=60,
    tune_learning_rate=1e-3,
)


def test_world_is_the_same_for_the_same_seed_and_has_no_name_twice():
    world = World.create(32, 8, seed=0)
    names = [name for country, facts in world.facts.items() for name in (country, *facts.values())]
    assert world == World.create(32, 8, seed=0) != World.create(32, 8, seed=1)
    assert len(names) == len(set(names)) == 32 * (1 + len(RELATIONS))


def test_held_out_questions_are_not_among_those_tuned_on():
    world = World.create(8, 3, seed=0)
    tuned_on, held_out = world.questions(held_out=False), world.questions(held_out=True)
    assert len(held_out) == 3 * len(RELATIONS)
    assert len(tuned_on) == 5 * len(RELATIONS)
    assert not any(country in row["prompt"] for row in tuned_on for country in world.held_out)


def test_passages_state_every_fact():
    world = World.create(4, 1, seed=0)
    sentences = " ".join(world.passages(400, seed=0)).split(".")
    for country, facts in world.facts.items():
        for value in facts.values():
            assert any(value in sentence for sentence in sentences), f"nothing says what {value} of {country} is"


def test_tokenizer_gives_texts_back():
    text = "The capital of Drelland is Brokton.\nQuestion: é?"
    tokenizer = train_tokenizer(["The capital of Drelland is Brokton."] * 3, 300)
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_every_fault_is_told():
    good = Outcome(base_loss=(6.0, 0.6), tune_loss=(4.0, 0.1), before=0.1, after=0.9, reloaded_same=True)
    bad = {"base_loss": (6.0, 5.9), "tune_loss": (4.0, 4.0), "after": 0.1, "reloaded_same": False}
    assert good.faults() == []
    for field, value in bad.items():
        assert len(dataclasses.replace(good, **{field: value}).faults()) == 1, field


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return dataclasses.replace(SMALL, output_dir=tmp_path_factory.mktemp("demo"))


def test_a_small_run_comes_out_well(settings, capsys):
    outcome = run(settings)
    assert outcome.faults() == []
    assert f"picture: {settings.picture}" in capsys.readouterr().out
    assert settings.picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((settings.base_dir / "config.json").read_text())["model_type"] == "llama"
    adapter = json.loads((settings.adapter_dir / "adapter_config.json").read_text())
    assert adapter["r"] == settings.lora_rank
    assert adapter["base_model_name_or_path"] == str(settings.base_dir.resolve())


def test_the_readme_example_runs(settings, monkeypatch):
    """Needs the base model that the small run left."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import" in block)
    example = example.replace("meta-llama/Llama-3.1-8B", str(settings.base_dir)).replace("max_steps=60", "max_steps=2")
    monkeypatch.chdir(settings.output_dir)
    row = {"text": "The capital of Fisland is Limton."}
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    exec(compile(example, "README.md", "exec"), {})
    assert Path("adapter/adapter_model.safetensors").stat().st_size > 0
