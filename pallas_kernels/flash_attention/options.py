"""All of an attention call that is not an array, and what is refused whatever runs it."""

from dataclasses import dataclass

import jax

Ids = tuple[jax.Array, jax.Array] | None  # segment ids [B, S] of the queries and of the keys


@dataclass(frozen=True)
class Options:
    """What a query sees, and how logits are made of products; 1 in 2^24 is the finest dropout rate.

    `deterministic` leaves out what need not give the same gradients twice.
    """

    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    scale: float
    dropout_rate: float = 0.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.sliding_window is not None and (self.sliding_window < 1 or not self.causal):
            raise ValueError(
                f"sliding_window={self.sliding_window} must be at least 1 and needs causal=True, not causal={self.causal}."
            )
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive; use None for no cap.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate} must be at least 0 and less than 1.")


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids) -> None:
    """Shapes and dtypes that belong together, or ValueError."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{q.shape=}, {k.shape=}, {v.shape=} must be [B, S, N, D], [B, S, K, D] and [B, S, K, D].")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be the same; cast before the call.")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} positions and k {k.shape[1]}: they must be equal, the same tokens.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads.")
    if ids is not None and ids[0].shape != q.shape[:2]:
        raise ValueError(f"segment_ids.shape={ids[0].shape} must be {q.shape[:2]}, one id per position.")
