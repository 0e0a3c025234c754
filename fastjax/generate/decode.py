"""Greedy or sampled continuation of prompts, the whole sequence run anew for each token.

Simple and exact: rows of different lengths lie left-aligned in one buffer, and as attention is causal, what lies
after a row's end cannot reach it. There is no key/value cache yet, so the cost of a token grows with the length; it is meant
for looking at what a model learnt, not for serving.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.errors import UserError
from fastjax.models.layers import dense_matmul
from fastjax.models.llama import Llama

BUCKET = 64  # buffers grow by this many tokens, so that few lengths are compiled


@partial(jax.jit, static_argnums=0)
def _next_logits(
    definition: nnx.GraphDef, parameters: nnx.State, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
) -> Float[Array, "B V"]:
    model = nnx.merge(definition, parameters)
    hidden = model.hidden(tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return dense_matmul(last, model.head_weight()).astype(jnp.float32)


def generate(
    model: Llama,
    prompts: Iterable[Sequence[int]] | Int[Array, "B S"],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Each prompt with its continuation, up to and including the first `eos_token_id`.

    `temperature` 0 takes the likeliest token; above 0 samples, the same for the same seed.
    """
    rows = (
        [[int(token) for token in prompt] for prompt in np.asarray(prompts)]
        if hasattr(prompts, "shape")
        else [list(map(int, prompt)) for prompt in prompts]
    )
    if not rows or not all(rows):
        raise UserError("generate needs at least one prompt, and each must hold at least one token.")
    if max_new_tokens < 1 or temperature < 0:
        raise UserError(f"{max_new_tokens=} must be at least 1 and {temperature=} at least 0.")
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    definition, parameters = nnx.split(model)
    longest = max(map(len, rows)) + max_new_tokens
    buffer = np.zeros((len(rows), -(-longest // BUCKET) * BUCKET), np.int32)
    for row, prompt in enumerate(rows):
        buffer[row, : len(prompt)] = prompt
    running = [True] * len(rows)
    for step in range(max_new_tokens):
        lengths = np.array([len(row) for row in rows], np.int32)
        logits = _next_logits(definition, parameters, buffer, lengths)
        if temperature == 0:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            tokens = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits / temperature)
        for index, token in enumerate(np.asarray(tokens).tolist()):
            if running[index]:
                buffer[index, len(rows[index])] = token
                rows[index].append(token)
                running[index] = token not in stops
        if not any(running):
            break
    return rows
