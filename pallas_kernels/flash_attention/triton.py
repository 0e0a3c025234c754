"""Launches of the Triton kernels: which calls they serve, their tiles, their arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import cuda_capability
from pallas_kernels.flash_attention.dropout import threshold
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.flash_attention.segments import GRAIN, MULTIPLE, SegmentMetadata
from pallas_kernels.triton_call import triton_call, triton_obstacle
from pallas_kernels.tuning import choice

LOG2E = 1.4426950408889634
L2_BYTES = 24 << 20  # keys and values of the heads in flight that a walk should find in the L2


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, warps of a program, stages of its loads; the block a program owns is in GRAINs."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for size in (self.queries, self.keys):
            if size < 16 or size > MULTIPLE or size & (size - 1):
                raise ValueError(f"{self}: blocks must be powers of 2 from 16 to {MULTIPLE}.")
        if self.warps not in (4, 8) or self.stages < 1:
            raise ValueError(f"{self}: warps must be 4 or 8, stages at least 1.")


@dataclass(frozen=True)
class Work:
    """What a kernel is compiled for; its parts take it whole."""

    length: int  # of a row
    heads: int
    kv_heads: int
    depth: int  # of a head
    wide: int  # columns of it in registers
    padded: int  # the length that segments are known for; 0 without
    scale: float
    cap: float  # 0: none
    causal: bool
    window: int  # 0: none
    segments: bool
    drop: int  # of 2^24 weights
    queries: int  # of a block
    keys: int
    section: int  # heads that run side by side

    @property
    def stride(self) -> int:
        """From one position's queries to the next one's."""
        return self.heads * self.depth

    @property
    def kv_stride(self) -> int:
        return self.kv_heads * self.depth

    @property
    def factor(self) -> float:
        """What x is multiplied by to become a logit to base 2."""
        return (self.cap or self.scale) * LOG2E

    @property
    def keep(self) -> float:
        return 1 - self.drop / 16777216


def obstacle(q: jax.Array, options: Options) -> str | None:
    """Why the Triton kernels cannot serve this call, None where they can."""
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 or bfloat16, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is larger than 256"
    if options.scale <= 0:
        return f"it needs a positive scale, not {options.scale}"
    return triton_obstacle()


def padded_depth(depth: int) -> int:
    """Columns a kernel holds in registers."""
    return max(16, 1 << (depth - 1).bit_length())


def default_tiles(kernel: str, depth: int, capability: tuple[int, int] | None) -> Tiles:
    """Tiles for "forward", "keys" or "queries" as measured; or such that fit the shared memory: 227 KB on Hopper, 99 KB on
    consumer cards.
    """
    wide = padded_depth(depth)
    if capability and capability[0] == 9:
        table = {
            "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 4), 256: Tiles(128, 64, 8, 2)},
            "keys": {64: Tiles(64, 128, 8, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 64, 8, 1)},
            "queries": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 128, 8, 2), 256: Tiles(128, 64, 8, 1)},
        }
    else:
        table = {
            "forward": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 32, 4, 2), 256: Tiles(64, 32, 8, 1)},
            "keys": {64: Tiles(64, 64, 4, 2), 128: Tiles(32, 64, 4, 2), 256: Tiles(16, 64, 8, 1)},
            "queries": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 16, 8, 1)},
        }
    wide = max(wide, 64)
    return choice(f"flash_attention.triton.{kernel}", table[kernel][wide], depth=wide)


def _section(heads: int, step: int, bytes_each: int) -> int:
    """How many heads run side by side: a divisor of `heads`, whole groups of `step`, that the L2 can hold."""
    wanted = max(1, L2_BYTES // bytes_each) * step
    return max(
        step * n for n in range(1, heads // step + 1) if heads // step % n == 0 and (n == 1 or step * n <= wanted)
    )


def work_of(
    kernel: str, q_shape: tuple[int, ...], kv_heads: int, padded: int, segments: bool, options: Options, tiles: Tiles
) -> Work:
    batch, length, heads, depth = q_shape
    bytes_each = 4 * length * depth
    if kernel == "keys":
        section = _section(batch * kv_heads, 1, bytes_each * (heads // kv_heads))
    else:
        section = _section(batch * heads, heads // kv_heads, bytes_each)
    return Work(
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        depth=depth,
        wide=padded_depth(depth),
        padded=padded,
        scale=options.scale,
        cap=options.soft_cap or 0.0,
        causal=options.causal,
        window=options.sliding_window or 0,
        segments=segments,
        drop=threshold(options.dropout_rate),
        queries=tiles.queries,
        keys=tiles.keys,
        section=section,
    )


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: SegmentMetadata | None,
    seed: jax.Array | None,
    options: Options,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """out [B, S, N, D] and lse [B, N, S]."""
    from pallas_kernels.flash_attention.triton_kernels import forward_kernel

    tiles = tiles or default_tiles("forward", q.shape[-1], cuda_capability())
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return _launch(
        forward_kernel,
        "forward",
        (q, k, v),
        segments,
        seed,
        options,
        tiles,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), lse),
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: SegmentMetadata | None,
    seed: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    options: Options,
    tiles: Mapping[str, Tiles] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv; delta [B, N, S] is o.g less lse's cotangent."""
    from pallas_kernels.flash_attention.triton_kernels import backward_keys_kernel, backward_queries_kernel

    capability, tiles = cuda_capability(), tiles or {}
    chosen = {name: tiles.get(name) or default_tiles(name, q.shape[-1], capability) for name in ("keys", "queries")}
    arrays = (q, k, v, dout, lse, delta)
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    dk, dv = _launch(backward_keys_kernel, "keys", arrays, segments, seed, options, chosen["keys"], (like_k, like_k))
    (dq,) = _launch(backward_queries_kernel, "queries", arrays, segments, seed, options, chosen["queries"], (like_q,))
    return dq, dk, dv


def _launch(
    kernel: Any,
    name: str,
    arrays: tuple[jax.Array, ...],
    segments: SegmentMetadata | None,
    seed: jax.Array | None,
    options: Options,
    tiles: Tiles,
    out: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    q, k = arrays[:2]
    own, owners = (tiles.keys, k.shape[2]) if name == "keys" else (tiles.queries, q.shape[2])
    if own % GRAIN:
        raise ValueError(f"{tiles} for {name}: the block a program owns must be a multiple of {GRAIN}.")
    none = jnp.zeros(1, jnp.int32)
    ids, ranges = (none, none) if segments is None else (segments.ids, segments.ranges)
    padded = 0 if segments is None else ids.shape[2]
    work = work_of(name, q.shape, k.shape[2], padded, segments is not None, options, tiles)
    programs = -(-q.shape[1] // own) * q.shape[0] * owners
    seeds = none if seed is None else seed.astype(jnp.int32).reshape(1)
    return triton_call(
        kernel, *arrays, ids, ranges, seeds, out=out, grid=(programs,), num_warps=tiles.warps, num_stages=tiles.stages,
        W=work,
    )  # fmt: skip
