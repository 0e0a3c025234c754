"""A config file, with the tiny model and the texts it names."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastjax.models import Llama, LlamaConfig, init_weights
from fastjax.weights.merge import save_model

CONFIG = """
model: {model_name: BASE, dtype: float32, load_in_4bit: true, max_seq_length: 32}
lora: {r: 2}
data: {path: DATA}
train: {output_dir: OUT, max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, packing: true, optim: adamw}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A config file, with the tiny model and the texts it names."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = LlamaConfig(vocab_size=258, head_dim=32, **sizes)
    save_model(
        tmp_path / "base", Llama(config, init_weights(config, jax.random.key(0)), dtype=jnp.float32), hf_config={}
    )
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(8)))
    text = CONFIG.replace("BASE", str(tmp_path / "base")).replace("DATA", str(tmp_path / "data.jsonl"))
    (tmp_path / "run.yaml").write_text(text.replace("OUT", str(tmp_path / "out")))
    return tmp_path / "run.yaml"
