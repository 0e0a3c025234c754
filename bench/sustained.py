"""What a layer's products reach when they run on and on, and what holds them there: power, clock, the driver's reason.

    python -m bench.sustained [--tokens 16384] [--out sustained.json]

A product measured alone for a few milliseconds runs faster than it does within a step, where the card is at its power
limit. Needs nvidia-ml-py. Each of Llama-3.1-8B's products, forward and towards its input, runs for SECONDS after a burst of ten.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pynvml

from bench.record import write_record

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # out, in: q/k/v, o, gate/up, down
SECONDS, BURST, LOOK_S = 0.8, 10, 0.02


class Watch:
    """Watts, MHz and the reasons for the clock, while a block runs; of its second half, when they have settled."""

    def __enter__(self) -> "Watch":
        self.running, self.looks = True, []
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    def _look(self) -> None:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while self.running:
            watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            self.looks.append((watts, clock, pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))
            time.sleep(LOOK_S)

    def summary(self) -> dict[str, Any]:
        settled = self.looks[len(self.looks) // 2 :]
        watts, clocks, reasons = zip(*settled, strict=True)
        return {
            "watts": round(sum(watts) / len(settled)),
            "mhz": round(sum(clocks) / len(settled)),
            "power_capped": any(reason & pynvml.nvmlClocksEventReasonSwPowerCap for reason in reasons),
        }


def measure(tokens: int, outer: int, inner: int, forward: bool) -> dict[str, Any]:
    """x W^T or g W of random data."""
    left, right = jax.random.split(jax.random.key(0))
    x = jax.random.normal(left, (tokens, inner if forward else outer), jnp.bfloat16)
    w = jax.random.normal(right, (outer, inner), jnp.bfloat16) * 0.02
    multiply = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1 if forward else 0,)), ((), ()))))
    multiply(x, w).block_until_ready()
    burst = seconds_of(multiply, x, w, BURST)
    with Watch() as watch:
        sustained = seconds_of(multiply, x, w, max(BURST, int(SECONDS / burst)))
    flops = 2 * tokens * outer * inner / 1e12
    product = f"{'x W^T' if forward else 'g W'}, W {outer}x{inner}, {tokens} tokens"
    rates = {"burst_tflops": round(flops / burst), "sustained_tflops": round(flops / sustained)}
    return {"product": product} | rates | watch.summary()


def seconds_of(multiply: Any, x: jax.Array, w: jax.Array, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        product = multiply(x, w)
    product.block_until_ready()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pynvml.nvmlInit()
    limit = pynvml.nvmlDeviceGetPowerManagementLimit(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1e3
    rows = [measure(arguments.tokens, *shape, forward) for shape in SHAPES for forward in (True, False)]
    print("\n".join(json.dumps(row) for row in rows))
    if arguments.out:
        write_record(arguments.out, {"power_limit_watts": limit, "rows": rows})


if __name__ == "__main__":
    main()
