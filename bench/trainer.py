"""What a trainer adds to its steps: waiting for data, and for checkpoints that are written meanwhile.

    python -m bench.trainer --shape llama3.1-8b --batch 8 --seq 2048 [--out trainer.json]

The same run twice, without checkpoints and with one every fourth step, on text of the standard library, tokenised and
packed before it starts. Each is timed between two log records, at which the device has come to rest.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.data import documents, make_tokenizer
from bench.record import print_row
from bench.workloads import SHAPES, random_packed_model
from fastjax import FastLanguageModel, SFTConfig, SFTTrainer, TrainerCallback

SAVE_EVERY, LOG_EVERY, STEPS = 4, 8, 24  # the first eight steps are not timed: the program is compiled in them


class Clock(TrainerCallback):
    """When each log record was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_log(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print_row(measure(arguments), arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    texts = documents()
    model = FastLanguageModel(random_packed_model(SHAPES[arguments.shape]), make_tokenizer(texts))
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    characters = 6 * STEPS * arguments.batch * arguments.seq  # a token stands for fewer
    records = [{"text": text} for text in itertools.islice(itertools.cycle(texts), characters // len(texts[0]))]
    without, with_saves = (train(model, records, arguments, saves) for saves in (0, SAVE_EVERY))
    steps = STEPS - LOG_EVERY
    step = without["seconds"] / steps
    cost = (with_saves["seconds"] - without["seconds"]) / (steps // SAVE_EVERY)
    return {
        "bs": arguments.batch,
        "seq": arguments.seq,
        "step_s": round(step, 4),
        "data_wait": round(max(without["data_wait"]), 5),
        "save_s": round(cost, 4),
        "save_of_a_step": round(cost / step, 4),
        "losses": without["losses"],
    }


def train(
    model: FastLanguageModel, records: list[dict], arguments: argparse.Namespace, save_steps: int
) -> dict[str, Any]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=arguments.batch,
            max_length=arguments.seq,
            packing=True,
            logging_steps=LOG_EVERY,
            save_steps=save_steps,
        )
        result = SFTTrainer(model=model, train_dataset=records, args=config, callbacks=[clock]).train()
    logs = [record for record in result.log_history if "loss" in record]
    return {
        "seconds": clock.times[-1] - clock.times[0],
        "data_wait": [record["data_wait"] for record in logs[1:]],
        "losses": [round(record["loss"], 3) for record in logs],
    }


if __name__ == "__main__":
    main()
