"""python -m bench.sanitize [OP ...]: a small pass of each hand-written kernel under compute-sanitizer; 0 if all are clean.

memcheck looks for accesses out of bounds and misaligned ones in every kernel. racecheck looks for hazards in shared
memory, and runs where that is managed by hand, in the Mosaic kernels; Triton's compiler places its own barriers. Shapes
are no multiples of a tile, so that edges are among what is checked. All passes run in one process; only if that is not
clean, or fails, has each one of its own, which tells the ones at fault.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels.between_attentions import random_layers
from pallas_kernels.between_attentions import between_attentions, new_counts
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.low_rank import contract_rows, low_rank_gradients, project_into
from pallas_kernels.nf4 import NF4Slice, dequantize_nf4, nf4_matmul, nf4_matvec, quantize_nf4, unpack_slices
from pallas_kernels.rms_norm import rms_norm, rms_norm_backward
from pallas_kernels.rope import rope_angles, rope_qkv, rope_qkv_backward
from pallas_kernels.swiglu import swiglu_backward, swiglu_forward

NOT_FOUND, UNCLEAN = 3, 9
BF16 = jnp.bfloat16


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def pack_and_unpack(implementation: str) -> list[Any]:
    q = quantize_nf4(normal(0, 3, 41, 192), implementation=implementation)
    single = quantize_nf4(normal(1, 41, 64), double_quant=False, implementation=implementation)
    slices = [NF4Slice(q, jnp.int32(2))] * 2
    both = unpack_slices(slices, BF16, after=normal(2, 1), rows=3, columns=64, implementation=implementation)
    return [dequantize_nf4(each, implementation=implementation) for each in (q, single)] + [both]


def few_rows(implementation: str) -> list[Any]:
    q = quantize_nf4(normal(0, 41, 192))
    return [nf4_matvec(normal(1, rows, 192), q, implementation=implementation) for rows in (1, 3, 16)]


def some_rows(implementation: str) -> list[Any]:
    q = quantize_nf4(normal(0, 41, 192))
    results = []
    for rows in (19, 130):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, q, implementation=implementation), normal(1, rows, 192))
        results.append((y, pullback(y)))
    return results


def attention(implementation: str, **options: Any) -> Any:
    length = 328
    q, k, v = normal(0, 1, length, 4, 64), normal(1, 1, length, 2, 64), normal(2, 1, length, 2, 64)
    ids = jnp.where(jnp.arange(length) < 300, 1 + jnp.arange(length) // 130, 0)[None]
    results = []
    for more in ({}, {"segment_ids": ids}, options):
        attend = partial(flash_attention, implementation=implementation, **more)
        out, pullback = jax.vjp(attend, q, k, v)
        results.append((out, pullback(out)))
    return results


def decoding(implementation: str) -> Any:
    caches = normal(1, 2, 2, 200, 64), normal(2, 2, 2, 200, 64)
    return decode_attention(normal(0, 2, 1, 4, 64), *caches, jnp.array([3, 199]), implementation=implementation)


def between(implementation: str) -> Any:
    layers = random_layers(4096, 2048, 256)
    x, o = normal(0, 2, 4096), normal(1, 2, 4096)
    name = "separate" if implementation == "xla" else implementation  # by ops, which have both
    return between_attentions(x, o, layers, jnp.int32(1), new_counts(len(layers.mlp_norm)), implementation=name)


def loss(implementation: str) -> Any:
    hidden, head = normal(0, 19, 64), normal(1, 1003, 64)
    labels = jnp.where(jnp.arange(19) % 4 == 0, -100, jnp.arange(19) * 50)

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, head, labels, label_smoothing=0.1, implementation=implementation).sum()

    gradients = (jax.grad(total, argnums=which)(hidden, head) for which in (0, (0, 1)))
    return total(hidden, head), *gradients


def low_rank(implementation: str) -> Any:
    scales = jnp.ones(16, jnp.float32)
    wide = normal(0, 70, 192 + 64)
    with_z = project_into(wide, normal(1, 192, 16), scales, implementation=implementation)
    gradients = low_rank_gradients(
        normal(2, 70, 16), wide, normal(3, 16, 192), scales, (16,), (192,), implementation=implementation
    )
    return with_z, contract_rows(with_z, wide, rank=16, start=192, implementation=implementation), gradients


def elementwise(implementation: str) -> Any:
    x, weight = normal(0, 5, 192), normal(1, 192)
    angles = rope_angles(jnp.arange(7, dtype=jnp.int32)[None], jnp.ones(32))
    heads = rope_qkv(normal(2, 7, 512), *angles, 4, 2, implementation=implementation)
    gate_up = normal(3, 5, 2 * 1100)
    return (
        rms_norm(x, weight, 1e-5, implementation=implementation),
        rms_norm_backward(x, weight, 1e-5, x, x, room=64, implementation=implementation),
        rope_qkv_backward(*heads, *angles, room=64, implementation=implementation),
        swiglu_forward(gate_up, room=64, implementation=implementation),
        swiglu_backward(gate_up, gate_up[:, :1100], room=64, implementation=implementation),
    )


@dataclass(frozen=True)
class Pass:
    """What runs, with which implementation, under which of the sanitizer's tools."""

    run: Callable[[str], Any]
    implementation: str = "triton"
    tools: tuple[str, ...] = ("memcheck",)


PASSES = {
    "pack and unpack": Pass(pack_and_unpack),
    "nf4_matvec": Pass(few_rows),
    "nf4_matmul": Pass(some_rows),
    "flash_attention triton": Pass(
        partial(attention, sliding_window=100, soft_cap=5.0, dropout_rate=0.1, dropout_seed=3)
    ),
    "flash_attention mosaic": Pass(
        partial(attention, sliding_window=100, soft_cap=5.0), "mosaic", ("memcheck", "racecheck")
    ),
    "decode_attention": Pass(decoding),
    "between_attentions": Pass(between),
    "linear_cross_entropy": Pass(loss),
    "low_rank": Pass(low_rank),
    "elementwise": Pass(elementwise),
}


def find_tool() -> str | None:
    """compute-sanitizer on the PATH, in a CUDA toolkit, or in a CUDA wheel beside jax's."""
    places = [*Path("/usr/local").glob("cuda*/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    places += [path.parent for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/compute-sanitizer")]
    return next(filter(None, (shutil.which("compute-sanitizer", path=p) for p in (None, *map(str, places)))), None)


def unclean(tool: str, sanitizer: str, names: Sequence[str]) -> list[str]:
    """Those of the passes that are not clean under one of the sanitizer's tools."""
    if not names or check(tool, sanitizer, names):
        return []
    return [name for name in names if len(names) == 1 or not check(tool, sanitizer, [name])] or ["all of them together"]


def check(tool: str, sanitizer: str, names: Sequence[str]) -> bool:
    """Whether the passes, in one process, are clean."""
    options = ["--tool", sanitizer, "--error-exitcode", str(UNCLEAN), "--report-api-errors", "no"]
    if sanitizer == "racecheck":  # the kernels XLA and cuBLAS bring along are not ours to check
        options += ["--kernel-name", "kns=flash_attention"]
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # bounds are those of single allocations only without a pool
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
    }
    command = [tool, *options, sys.executable, "-m", "bench.sanitize", "--run", *names]
    print(f"{sanitizer}: {', '.join(names)}", flush=True)
    return subprocess.run(command, env=environment, check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(PASSES)}; all of them by default")
    parser.add_argument("--run", nargs="+", choices=PASSES, help="run passes as they are, without the sanitizer")
    options = parser.parse_args(arguments)
    if options.run:
        for chosen in map(PASSES.__getitem__, options.run):
            jax.block_until_ready(chosen.run(chosen.implementation))
        return 0
    if unknown := set(options.ops) - set(PASSES):
        parser.error(f"no pass for {', '.join(sorted(unknown))}: choose from {', '.join(PASSES)}")
    tool = find_tool()
    if tool is None:
        print(
            "compute-sanitizer was not found on the PATH, under /usr/local/cuda*/bin or among the CUDA wheels: it comes with "
            "the CUDA toolkit.",
            file=sys.stderr,
        )
        return NOT_FOUND
    faults = []
    for sanitizer in ("memcheck", "racecheck"):
        names = [name for name in options.ops or PASSES if sanitizer in PASSES[name].tools]
        faults += [f"{sanitizer}: {name}" for name in unclean(tool, sanitizer, names)]
    print("not clean" if faults else "all clean", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
