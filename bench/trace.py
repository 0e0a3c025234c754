"""Where a step's time goes on the GPU: its kernels, read from the profiler and summed by kind.

Idle is the time of the traced span in which no kernel and no copy ran.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# first match decides; kernels that XLA makes are named after the operations fused into them
KINDS = (
    ("attention", r"flash|attention|cudnn|fmha|sdpa"),
    ("low rank", r"low_rank|lora|project_kernel|factor"),
    ("loss", r"cross_entropy|softmax|logit|lse"),
    ("optimizer", r"adam|blockwise"),
    ("unpack", r"nf4|dequant"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|matmul|wgmma|hmma|splitk"),
    ("norm, rope, swiglu", r"rms_norm|rope|swiglu"),
    ("copy", r"memcpy|memset|copy|transpose|concatenate|dynamic_update|pad|slice"),
    ("other elementwise", r".*"),
)


@dataclass(frozen=True)
class Kernel:
    """One execution, in nanoseconds."""

    name: str
    start: float
    duration: float
    scope: str

    @property
    def kind(self) -> str:
        text = f"{self.name} {self.scope}".lower()
        return next(kind for kind, pattern in KINDS if re.search(pattern, text))


def traced_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels and copies of all GPUs while `run` and what it started were under way."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        paths = list(Path(directory).rglob("*.xplane.pb"))
        return [kernel for path in paths for kernel in _read(jax.profiler.ProfileData.from_file(str(path)))]


def _read(profile: Any) -> Iterable[Kernel]:
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                scope = str(stats.get("name", stats.get("tf_op", "")))
                yield Kernel(event.name, event.start_ns, event.duration_ns, scope)


def busy_fraction(kernels: list[Kernel]) -> float:
    """Of the span from the first kernel's start to the last one's end, the share with any kernel running."""
    spans = sorted((kernel.start, kernel.start + kernel.duration) for kernel in kernels)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


def by_kind(kernels: list[Kernel], steps: int) -> dict[str, float]:
    """Milliseconds a step, by kind, largest first."""
    return _summed(((kernel.kind, kernel.duration) for kernel in kernels), steps)


def by_name(kernels: list[Kernel], steps: int, count: int = 40) -> dict[str, float]:
    """The same by kernel, the `count` largest; numbers that only tell instances apart are left out of the names."""
    named = ((f"{kernel.kind}: {re.sub(r'[._]?[0-9]+$', '', kernel.name)[:90]}", kernel.duration) for kernel in kernels)
    return dict(list(_summed(named, steps).items())[:count])


def _summed(pairs: Iterable[tuple[str, float]], steps: int) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, duration in pairs:
        totals[name] = totals.get(name, 0.0) + duration / 1e6 / steps
    return {name: round(total, 3) for name, total in sorted(totals.items(), key=lambda item: -item[1])}
