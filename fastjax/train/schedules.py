"""Learning-rate schedules under Hugging Face's names, equal to transformers.get_scheduler's.

The rate of the update number n = 0, 1, ... (the first update under warm-up has rate 0, as there):

    n < warm-up          peak * n / warm-up
    linear               peak * left                   left = (total - n) / (total - warm-up), within [0, 1]
    cosine               peak * sin^2(pi / 2 * left)   = peak * (1 + cos(pi * (1 - left))) / 2, without its cancellation
    cosine_with_restarts the same: of one cycle, which is what it has there too unless told otherwise
    constant_with_warmup peak
    constant             peak from the start: it has no warm-up, also in transformers

Past `total_steps` linear and cosine stay at 0 (transformers' cosine would rise again).
"""

import difflib
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fastjax.errors import UserError

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda left: left,
    "cosine": lambda left: jnp.square(jnp.sin(math.pi / 2 * left)),
    "cosine_with_restarts": lambda left: SCHEDULES["cosine"](left),
    "constant": jnp.ones_like,
    "constant_with_warmup": jnp.ones_like,
}


def warmup_step_count(warmup_steps: float, warmup_ratio: float, total_steps: int) -> int:
    """Steps of warm-up: `warmup_steps` where given (below 1 a share of the run), else the share `warmup_ratio`."""
    for name, value in (("warmup_steps", warmup_steps), ("warmup_ratio", warmup_ratio)):
        if value < 0:
            raise UserError(f"{name}={value!r} must not be negative.")
    if warmup_ratio > 1:
        raise UserError(f"warmup_ratio={warmup_ratio!r} is a share of the run, at most 1; a number is warmup_steps.")
    if warmup_steps >= 1:
        return int(warmup_steps)
    return math.ceil(total_steps * (warmup_steps or warmup_ratio))


def make_schedule(
    lr_scheduler_type: str,
    learning_rate: float,
    *,
    warmup_steps: float = 0,
    warmup_ratio: float = 0.0,
    total_steps: int,
) -> optax.Schedule:
    """The schedule as a function of the number of updates done, traceable under jit; float32."""
    if lr_scheduler_type not in SCHEDULES:
        near = difflib.get_close_matches(str(lr_scheduler_type), SCHEDULES, n=1)
        raise UserError(
            f"lr_scheduler_type={lr_scheduler_type!r} is unknown{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"Valid: {', '.join(SCHEDULES)}."
        )
    if total_steps < 1:
        raise UserError(f"{total_steps=} must be at least 1.")
    warmup = warmup_step_count(warmup_steps, warmup_ratio, total_steps)
    if lr_scheduler_type == "constant" and warmup:
        warnings.warn(
            f"lr_scheduler_type='constant' has no warm-up: {warmup} warm-up steps are ignored; "
            "use 'constant_with_warmup' to have them.",
            stacklevel=2,
        )
        warmup = 0
    decay = SCHEDULES[lr_scheduler_type]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count).astype(jnp.float32)
        left = jnp.clip((total_steps - step) / max(1, total_steps - warmup), 0, 1)
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), decay(left))

    return schedule
