"""All of an attention call that is not an array, and what is refused whatever runs it."""

import math
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check_floats

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
        if self.sliding_window is not None:
            check_window(self.sliding_window)
            if not self.causal:
                raise ValueError(f"sliding_window={self.sliding_window} needs causal=True, not causal={self.causal}.")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive and finite; use None for no cap.")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate} must be at least 0 and less than 1.")


def check_window(window: int) -> None:
    try:
        valid = 1 <= operator.index(window) < 1 << 31
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"sliding_window={window} must be at least 1, a whole number of positions below 2^31.")


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids) -> None:
    """Shapes and dtypes that belong together, or ValueError."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{q.shape=}, {k.shape=}, {v.shape=} must be [B, S, N, D], [B, S, K, D] and [B, S, K, D].")
    if not q.size or not k.size:
        raise ValueError(f"{q.shape=} and {k.shape=} must hold at least one row, position, head and dimension.")
    check_floats("flash_attention", q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be the same; cast before the call.")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} positions and k {k.shape[1]}: they must be equal, the same tokens.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads.")
    if ids is not None and ids[0].shape != q.shape[:2]:
        raise ValueError(f"segment_ids.shape={ids[0].shape} must be {q.shape[:2]}, one id per position.")
    if ids is not None and not (jnp.issubdtype(ids[0].dtype, jnp.integer) or ids[0].dtype == bool):
        raise TypeError(f"segment_ids.dtype={ids[0].dtype} must be an integer type.")
