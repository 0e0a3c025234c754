"""QLoRA, as a user would write it: the base in 4 bits, an adapter on every projection, a trainer, an export."""

from collections.abc import Sequence
from typing import Any

from fastjax.api import FastLanguageModel
from fastjax.data import Record
from fastjax.demo.settings import Settings
from fastjax.train.config import SFTConfig
from fastjax.train.trainer import SFTTrainer


def load_base(settings: Settings) -> FastLanguageModel:
    """The base model from its directory, packed to 4 bits; float32 is what CPUs compute fastest."""
    # the adapter will name this path as its base, and must be usable from anywhere
    directory = settings.base_dir.resolve()
    model, _ = FastLanguageModel.from_pretrained(
        directory, max_seq_length=64, dtype="float32", load_in_4bit=True, progress=False
    )
    return model


def tune(
    settings: Settings, model: FastLanguageModel, questions: Sequence[Record], held_out: Sequence[Record]
) -> list[dict[str, Any]]:
    """Trains an adapter on `questions` and exports it. Returns the log, with the loss on `held_out` along the way."""
    rank = settings.lora_rank
    model = FastLanguageModel.get_peft_model(model, r=rank, lora_alpha=rank, random_state=settings.seed)
    trainer = SFTTrainer(
        model=model,
        train_dataset=questions,
        eval_dataset=held_out,
        args=SFTConfig(
            output_dir=str(settings.output_dir / "tuning"),
            per_device_train_batch_size=settings.tune_batch,
            per_device_eval_batch_size=settings.tune_batch,
            max_steps=settings.tune_steps,
            learning_rate=settings.tune_learning_rate,
            warmup_ratio=0.05,
            optim="adamw",
            logging_steps=max(1, settings.tune_steps // 12),
            eval_steps=max(1, settings.tune_steps // 6),
            save_steps=0,
            seed=settings.seed,
        ),
    )
    log = trainer.train().log_history
    model.save_pretrained(settings.adapter_dir)
    return log
