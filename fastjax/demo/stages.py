"""The stages of the demo in order, and the judgement: losses fall, answers improve, the export is the whole model."""

import dataclasses
import math
import time
from typing import Any

import jax

from fastjax.demo.answers import ask, ask_in_fresh_process
from fastjax.demo.base import train_base
from fastjax.demo.report import answer_table, draw, heading, line, shorten
from fastjax.demo.settings import Settings
from fastjax.demo.tokenizer import train_tokenizer
from fastjax.demo.tuning import load_base, tune
from fastjax.demo.world import World
from fastjax.lora import trainable_parameters

SHOWN = 8  # questions in the table


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run. Losses are (first, last); scores are shares of held-out questions answered right."""

    base_loss: tuple[float, float]
    tune_loss: tuple[float, float]
    before: float
    after: float
    reloaded_same: bool

    def faults(self) -> list[str]:
        """What a working library would not have shown; nothing if all is well."""
        (base_first, base_last), (tune_first, tune_last) = self.base_loss, self.tune_loss
        checks = {
            f"the base's loss did not halve: {base_first:.3f} -> {base_last:.3f}": base_last < base_first / 2,
            f"the adapter's loss did not halve: {tune_first:.3f} -> {tune_last:.3f}": tune_last < tune_first / 2,
            f"answers did not improve: {self.before:.0%} right, then {self.after:.0%}": self.after > self.before,
            "the reloaded adapter answers differently": self.reloaded_same,
        }
        return [fault for fault, good in checks.items() if not good]


def run(settings: Settings) -> Outcome:
    """Everything, from inventing facts to reloading the adapter in a new process."""
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"fastjax demo: made, trained and tested offline on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    world = World.create(settings.countries, settings.held_out, settings.seed)
    held_out = world.questions(held_out=True)
    prompts, right = [row["prompt"] for row in held_out], [row["completion"].strip() for row in held_out]

    heading(1, f"A base model, trained to read about {settings.countries} invented countries")
    base_losses = make_base(settings, world)

    heading(2, "QLoRA: the base in 4 bits learns to answer questions")
    before, after, log = make_adapter(settings, world, prompts)

    heading(3, f"Questions about the {settings.held_out} countries held out")
    scores = {"before": share_right(before, right), "after": share_right(after, right)}
    some = slice(None, None, math.ceil(len(prompts) / SHOWN))
    answer_table([row["question"] for row in held_out[some]], before[some], after[some], right[some])
    line(f"right before tuning: {scores['before']:.0%} of {len(right)}, after: {scores['after']:.0%}")

    heading(4, "The exported adapter, loaded by a fresh process")
    reloaded = ask_in_fresh_process(settings.adapter_dir, prompts)
    scores["reloaded"] = share_right(reloaded, right)
    same = sum(here == there for here, there in zip(after, reloaded, strict=True))
    line(f"{same} of {len(after)} answers are the same")
    draw(settings, base_losses, log, scores)
    line(f"picture: {settings.picture}")

    tune_losses = [record["loss"] for record in log if "loss" in record]
    return Outcome(
        base_loss=(base_losses[0], base_losses[-1]),
        tune_loss=(tune_losses[0], tune_losses[-1]),
        before=scores["before"],
        after=scores["after"],
        reloaded_same=reloaded == after,
    )


def make_base(settings: Settings, world: World) -> list[float]:
    """Tokenizer and base model, trained and saved. Returns the loss of every step."""
    passages = world.passages(settings.passages, settings.seed)
    line(f"it reads: {shorten(passages[0], 105)}")
    tokenizer = train_tokenizer(passages, settings.vocab_size)
    began = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        if step in (1, settings.base_steps) or step % math.ceil(settings.base_steps / 5) == 0:
            line(f"step {step:4}/{settings.base_steps}  loss {loss:.3f}  {time.perf_counter() - began:3.0f} s")

    model, losses = train_base(settings, passages, tokenizer, on_step)
    size = f"{trainable_parameters(model.module):,} weights, {len(tokenizer)} tokens"
    line(f"saved {settings.base_dir} as a Hugging Face checkpoint: {size}")
    return losses


def make_adapter(
    settings: Settings, world: World, prompts: list[str]
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Answers of the base in 4 bits, answers after tuning, and the log of the tuning in between."""
    tuned_on, held_out = world.questions(held_out=False), world.questions(held_out=True)
    line(f"{len(tuned_on)} examples such as {(tuned_on[0]['prompt'] + tuned_on[0]['completion'])!r}")
    model = load_base(settings)
    before = ask(model, prompts)
    log = tune(settings, model, tuned_on, held_out)
    line(f"exported {settings.adapter_dir} as a PEFT adapter")
    return before, ask(model, prompts), log


def share_right(answers: list[str], right: list[str]) -> float:
    return sum(answer == truth for answer, truth in zip(answers, right, strict=True)) / len(right)
