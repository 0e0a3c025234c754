"""Which implementation of an op runs, and how precisely XLA multiplies for it.

Every op lists its implementations in order of preference, each with the obstacle that keeps it from this call, or None.
Without a request the first one free of obstacles runs; an explicit request runs or is an error, never replaced.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def choose_implementation(op: str, implementation: str | None, obstacles: Mapping[str, str | None]) -> str:
    """The implementation to run. `obstacles`: name -> why it cannot, or None; the last one is always able."""
    if implementation is None:
        return next(name for name, obstacle in obstacles.items() if obstacle is None)
    if implementation not in obstacles:
        raise ValueError(f"{op} has no {implementation=}; use one of {', '.join(obstacles)}, or None to let it choose.")
    if obstacle := obstacles[implementation]:
        able = ", ".join(name for name, reason in obstacles.items() if reason is None)
        raise ValueError(f"{op} cannot run with {implementation=}: {obstacle}; use {able}, or None to let it choose.")
    return implementation


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU that runs by default, such as (9, 0); None where there is none."""
    major, _, minor = str(getattr(_default_device(), "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None  # an AMD GPU says "gfx..."


def device_kind() -> str:
    """What the device that runs by default is called, such as "NVIDIA H200"."""
    return _default_device().device_kind


def multiprocessors() -> int:
    """Of the device that runs by default, each of which runs one program; an H200's where there is no GPU."""
    return int(getattr(_default_device(), "core_count", None) or 132)


def _default_device() -> Any:
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def check_floats(op: str, **arrays: jax.Array) -> None:
    """Raises a TypeError that names the array which does not hold floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op} takes floating-point arrays, but {name} is {array.dtype}; convert it.")


def exact_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 is multiplied as float32, where a GPU's default would round it to tf32; 16-bit types need nothing."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
