"""Whether a run that is killed again and again ends as one that never was.

    python -m bench.kill_resume --kills 20 [--out FILE]

A small run of `fastjax train` is killed (SIGKILL) at random moments, every second time while a checkpoint is being
written, and resumed each time; its losses and its adapter must be those of an uninterrupted run, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.record import write_record
from fastjax.models import Llama, LlamaConfig, init_weights
from fastjax.train.checkpoints import list_checkpoints
from fastjax.train.metrics import read_metrics
from fastjax.weights.merge import save_model

CONFIG = """
model: {{model_name: {directory}/base, dtype: float32, max_seq_length: 64}}
lora: {{r: 4, lora_dropout: 0.1}}
data: {{path: {directory}/data.jsonl}}
train:
  output_dir: {directory}/unused
  max_steps: {steps}
  per_device_train_batch_size: 2
  packing: true
  logging_steps: 3
  save_steps: 5
  save_total_limit: 2
  learning_rate: 1e-2
"""
UNREPEATABLE = ("tokens_per_second", "data_wait", "peak_memory_gib")


def write_run(directory: Path, steps: int) -> Path:
    """A tiny model, its tokenizer, texts, and the YAML that names them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = LlamaConfig(vocab_size=258, head_dim=32, **sizes)
    model = Llama(config, init_weights(config, jax.random.key(0)), dtype=jnp.float32)
    save_model(directory / "base", model, hf_config={})
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(
        directory / "base"
    )
    texts = [{"text": f"{number} is followed by {number + 1}"} for number in range(200)]
    (directory / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    path = directory / "run.yaml"
    path.write_text(CONFIG.format(directory=directory, steps=steps))
    return path


def start(config: Path, output_dir: Path) -> subprocess.Popen:
    """A process of the run, which goes on from its latest checkpoint if it has one."""
    settings = [f"train.output_dir={output_dir}", "train.resume_from_checkpoint=auto"]
    command = [sys.executable, "-m", "fastjax", "train", str(config), *settings]
    with (config.parent / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen, config: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the run failed:\n{(config.parent / 'log.txt').read_text()[-3000:]}")


def kill(process: subprocess.Popen, output_dir: Path, while_saving: bool, chance: random.Random) -> int:
    """Kills the process once it is training; returns the last step that it had logged."""
    before = len(read_metrics(output_dir / "metrics.jsonl"))
    wanted = before + chance.randint(1, 6)
    while process.poll() is None:
        records = read_metrics(output_dir / "metrics.jsonl")
        saving = any(output_dir.glob("checkpoint-*.tmp"))
        if len(records) >= wanted and (saving or not while_saving):
            time.sleep(chance.random() * 0.02)
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    records = read_metrics(output_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def outcome(output_dir: Path) -> tuple[list[dict], bytes]:
    """(log records without the times in them, the adapter)."""
    records = [
        {name: value for name, value in record.items() if name not in UNREPEATABLE}
        for record in read_metrics(output_dir / "metrics.jsonl")
    ]
    return records, (output_dir / "adapter_model.safetensors").read_bytes()


def measure(directory: Path, kills: int, seed: int = 0, steps: int = 400) -> dict:
    config, chance = write_run(directory, steps), random.Random(seed)
    whole, cut = directory / "whole", directory / "cut"
    finish(start(config, whole), config)
    killed = []
    for number in range(kills):
        step = kill(start(config, cut), cut, while_saving=number % 2 == 0, chance=chance)
        killed.append({"step": step, "checkpoints": [path.name for path in list_checkpoints(cut)]})
        if step >= steps:
            raise SystemExit(f"the run ended before kill {number + 1}: it has too few steps")
    finish(start(config, cut), config)
    (records, adapter), (again, adapter_again) = outcome(whole), outcome(cut)
    return {
        "kills": killed,
        "steps": steps,
        "losses_identical": records == again,
        "adapter_identical": adapter == adapter_again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory), options.kills, options.seed)
    print(json.dumps(results))
    if options.out:
        write_record(options.out, results)


if __name__ == "__main__":
    main()
