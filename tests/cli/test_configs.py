"""Every file in configs/ is a run that loads, and that fits the card it says it is for."""

from pathlib import Path

import pytest

from fastjax.cli import main, plan
from fastjax.cli.config import load_run_config

CONFIGS = Path(__file__).parents[2] / "configs"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 8192


def hf_config(hidden: int, mlp: int, layers: int, heads: int, tied: bool = False) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "Llama-3.2-1B-Instruct": hf_config(2048, 8192, 16, 32, tied=True),
    "Llama-3.1-8B": hf_config(4096, 14336, 32, 32),
    "Llama-3.1-8B-Instruct": hf_config(4096, 14336, 32, 32),
    "Llama-3.1-70B-Instruct": hf_config(8192, 28672, 80, 64),
}
CARDS = {  # GiB a program can use on the card that each file names
    "llama3.1-8b-qlora.yaml": 79,
    "llama3.1-8b-qlora-24gb.yaml": 23.5,
    "llama3.1-70b-qlora.yaml": 79,
    "llama3.1-8b-qlora-8gpu.yaml": 79,
    "llama3.1-8b-qlora-long-8gpu.yaml": 79,
    "llama3.1-8b-continued-pretraining.yaml": 79,
    "llama3.2-1b-full.yaml": 39.5,
}


def test_each_file_is_listed() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_it_loads_and_fits_its_card(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = load_run_config(CONFIGS / name).model["model_name"].removeprefix("meta-llama/")
    monkeypatch.setattr(plan, "find_model", lambda name: (name, name, name))
    monkeypatch.setattr(plan, "read_config", lambda path: MODELS[model])
    assert main(["plan", str(CONFIGS / name), "--memory", str(CARDS[name])]) == 0
    printed = capsys.readouterr().out
    print(printed)
    assert "a step needs at least" not in printed
    assert printed.splitlines()[-1].startswith("  auto")


def test_a_mesh_in_the_file(tmp_path: Path) -> None:
    assert load_run_config(CONFIGS / "llama3.1-8b-qlora-8gpu.yaml").mesh == {"data": 8}
    assert load_run_config(CONFIGS / "llama3.1-8b-qlora.yaml", ["mesh.fsdp=2"]).mesh == {"fsdp": 2}
    with pytest.raises(ValueError, match="'fsdp' in section 'mesh' must be a whole number of devices, found 'two'"):
        load_run_config(CONFIGS / "llama3.1-8b-qlora.yaml", ["mesh.fsdp=two"])
    with pytest.raises(ValueError, match="Unknown key 'fsdpp' in section 'mesh': did you mean 'fsdp'"):
        load_run_config(CONFIGS / "llama3.1-8b-qlora.yaml", ["mesh.fsdpp=2"])
