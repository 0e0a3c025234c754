"""A base model from nothing: every weight trained through the functional core, then saved as a HF checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fastjax.api import FastLanguageModel
from fastjax.data import batch_at, pack, tokenize_dataset
from fastjax.demo.settings import Settings
from fastjax.models import Llama, init_weights
from fastjax.train.optimizers import make_optimizer
from fastjax.train.schedules import make_schedule
from fastjax.train.step import init_train_state, make_train_step


def train_base(
    settings: Settings, passages: Sequence[str], tokenizer: Any, on_step: Callable[[int, float], None]
) -> tuple[FastLanguageModel, list[float]]:
    """The trained model and the loss of every step; `on_step(step, loss)` is told each of them."""
    weights = init_weights(settings.model, jax.random.key(settings.seed))
    module = Llama(settings.model, weights, dtype=jnp.dtype(jnp.float32), trainable=True)
    model = FastLanguageModel(module, tokenizer, max_seq_length=settings.row_length)
    texts = [{"text": passage} for passage in passages]
    rows = pack(tokenize_dataset(texts, tokenizer, max_length=settings.row_length), settings.row_length)

    steps = settings.base_steps
    schedule = make_schedule("cosine", settings.base_learning_rate, warmup_ratio=0.05, total_steps=steps)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.01, max_grad_norm=1.0)
    state = init_train_state(model, optimizer, seed=settings.seed)
    train_step = make_train_step(model, optimizer)
    losses = []
    for step in range(steps):
        batch = jax.device_put(batch_at(rows, step, batch_size=settings.base_batch, seed=settings.seed))
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        on_step(step + 1, losses[-1])
    model.load_train_state(state)
    model.save_pretrained(settings.base_dir)
    return model, losses
