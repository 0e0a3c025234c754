"""What 16 bits cost: the loss of 200 QLoRA steps on a small real model in bfloat16, against the same steps in float32.

    python -m bench.accuracy [--out accuracy.json]

A Llama of some 25 million weights learns Python's standard library, every weight trained in float32, and is packed to 4
bits. An adapter is then trained on other files of it, in float32 and in bfloat16 under each policy: the same weights, the
same batches. Recorded are the losses, and how far each run's curve, a mean over WINDOW steps, is from float32's.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.record import write_record
from bench.workloads import standard_library_texts
from fastjax import FastLanguageModel, init_train_state, make_train_step
from fastjax.data import Rows, batch_at, pack, tokenize_dataset
from fastjax.demo.base import train_base
from fastjax.demo.settings import Settings
from fastjax.demo.tokenizer import train_tokenizer
from fastjax.train.optimizers import make_optimizer

STEPS = 200
WINDOW = 10
RUNS = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "full"), ("bfloat16", "offload"))
SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_layers": 8, "row_length": 512, "base_learning_rate": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(Settings(Path(folder), base_steps=arguments.base_steps), **SIZES)
        results = measure(settings, arguments.steps)
    if arguments.out:
        write_record(arguments.out, results)


def measure(settings: Settings, steps: int) -> dict[str, Any]:
    texts = standard_library_texts(6_000_000)
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    _, base = train_base(settings, list(passages(texts[::2])), tokenizer, lambda step, loss: None)
    print(f"base: {base[0]:.3f} -> {np.mean(base[-20:]):.3f}", flush=True)
    others = [{"text": passage} for passage in passages(texts[1::2])]
    rows = pack(tokenize_dataset(others, tokenizer, max_length=settings.row_length), settings.row_length)
    losses = {f"{dtype} {policy}": tune(settings, rows, dtype, policy, steps) for dtype, policy in RUNS}
    reference, *others = losses
    distances = {name: distance(losses[name], losses[reference]) for name in others}
    for name, found in distances.items():
        print(f"{name}: {losses[name][0]:.4f} -> {np.mean(losses[name][-WINDOW:]):.4f}, {found}", flush=True)
    return {
        "model": SIZES | {"base_steps": settings.base_steps, "base_loss": round(float(np.mean(base[-20:])), 4)},
        "window": WINDOW,
        "from_float32": distances,
        "losses": {name: [round(loss, 5) for loss in values] for name, values in losses.items()},
    }


def passages(texts: Sequence[str], length: int = 1200) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), length):
            yield text[start : start + length]


def tune(settings: Settings, rows: Rows, dtype: str, policy: str, steps: int) -> list[float]:
    """The loss of every step of QLoRA on the base."""
    model, _ = FastLanguageModel.from_pretrained(settings.base_dir, dtype=dtype, load_in_4bit=True, progress=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=settings.seed)
    optimizer = make_optimizer("adamw", 5e-4)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer, gradient_checkpointing=policy)
    losses = []
    for number in range(steps):
        batch = batch_at(rows, number, batch_size=settings.base_batch, seed=settings.seed)
        state, metrics = step(state, jax.device_put(batch))
        losses.append(metrics["loss"])
    return [float(loss) for loss in losses]


def distance(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The largest, over the run, of what lies between two smoothed curves, in % of the reference; and over single steps."""
    smooth, expected = (np.convolve(each, np.ones(WINDOW) / WINDOW, "valid") for each in (losses, reference))
    single = np.abs(np.array(losses) / np.array(reference) - 1)
    return {
        "curve_percent": round(100 * float(np.abs(smooth / expected - 1).max()), 4),
        "step_percent": round(100 * float(single.max()), 4),
    }


if __name__ == "__main__":
    main()
