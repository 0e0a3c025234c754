"""Which token comes next: transformers' settings, in its order, each row of a batch with its own.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> a draw, or at temperature 0 the likeliest

A row's draws follow from its seed and how many tokens it has made: the same in whatever batch it is.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastjax.errors import UserError

NEVER = np.float32(-np.inf)  # of numpy: an array of JAX made here would start its devices
SEEDS = 1 << 32
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: value >= 0, "at least 0"),
    "top_k": (lambda value: 0 <= operator.index(value) < 1 << 31, "a whole number, at least 0, which takes all"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "seed": (
        lambda value: 0 <= operator.index(value) < SEEDS,
        f"a whole number, at least 0 and below {SEEDS}, with every sequence's number added",
    ),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (is_valid, words) in VALID.items():
            value = getattr(self, name)
            try:
                valid = is_valid(value)
            except TypeError:  # text, None, or a fraction where whole numbers belong
                valid = False
            if not valid:
                raise UserError(f"{name}={value!r} is not valid: it must be {words}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """The settings of a batch, an array each; what no row uses is None, and no work."""

    temperature: Float[Array, "B"] | None
    filters: "Filters | None"
    repetition_penalty: Float[Array, "B"] | None
    seed: Int[Array, "B"]

    @property
    def is_greedy(self) -> bool:
        """Whether all rows take the highest logit, as it is."""
        return self.temperature is None and self.repetition_penalty is None

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "RowSampling":
        def column(name: str, dtype: type = np.float32) -> Any:
            return np.array([getattr(row, name) for row in rows], dtype)

        sampled = any(row.temperature for row in rows)
        filtered = sampled and any(row.top_k or row.top_p < 1 or row.min_p for row in rows)
        return cls(
            temperature=column("temperature") if sampled else None,
            filters=Filters(column("top_k", np.int32), column("top_p"), column("min_p")) if filtered else None,
            repetition_penalty=(
                column("repetition_penalty") if any(row.repetition_penalty != 1 for row in rows) else None
            ),
            seed=column("seed", np.uint32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filters:
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], made: Int[Array, "B"], sampling: RowSampling
) -> Int[Array, "B"]:
    """The next token of each row. `seen` are the tokens of its text so far, `made` how many of them it has made."""
    if sampling.repetition_penalty is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.temperature is None:
        return likeliest
    warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    logits = logits / warm[:, None]
    if sampling.filters is not None:
        logits = filtered(logits, sampling.filters)
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(sampling.seed, made)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, drawn, likeliest)


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]) -> Float[Array, "B V"]:
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def filtered(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """-inf for what top-k, then top-p of the rest, then min-p leave out."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    top_k = jnp.where(filters.top_k > 0, jnp.minimum(filters.top_k, vocab), vocab)
    least = jnp.take_along_axis(ordered, (top_k - 1)[:, None], axis=-1)
    ordered = jnp.where(ordered >= least, ordered, NEVER)
    # kept are the fewest tokens that hold top_p of the probability: those before which less than top_p lies
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < filters.top_p[:, None]) | (filters.top_p[:, None] >= 1)
    smallest = jnp.min(jnp.where(kept & (ordered > NEVER), ordered, jnp.inf), axis=-1, keepdims=True)
    by_min_p = ordered[:, :1] + jnp.log(filters.min_p)[:, None]
    return jnp.where(logits >= jnp.maximum(jnp.maximum(smallest, least), by_min_p), logits, NEVER)
