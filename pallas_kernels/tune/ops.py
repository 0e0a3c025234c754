"""What each op can choose among, for which named workloads, and what its results must be.

Candidates are few: what differs in kind, not every number between. Those that need more shared memory than a GPU has do
not compile there, and are left out when they are tried.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention, storage_obstacle
from pallas_kernels.decode_attention import op as decode
from pallas_kernels.decode_attention.stack import quantized
from pallas_kernels.dispatch import cuda_capability, multiprocessors
from pallas_kernels.flash_attention import attention_backward, attention_forward, mosaic, mosaic_backward, triton
from pallas_kernels.flash_attention.mosaic_common import obstacle as mosaic_obstacle
from pallas_kernels.flash_attention.op import LONG, AfterMosaic
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.chunks import CHUNK_BYTES, Limit
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, fused, nf4_matmul, quantize_nf4, unpack
from pallas_kernels.nf4 import mosaic as nf4_mosaic
from pallas_kernels.nf4.products import default_way
from pallas_kernels.swiglu import packed as swiglu
from pallas_kernels.tune.search import Tunable
from pallas_kernels.tuning import bucket
from pallas_kernels.workloads import LAYER, attention, head, product

F32, BF16 = jnp.float32, jnp.bfloat16
EXACT = jax.lax.Precision.HIGHEST


def normal(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(scale * jax.random.normal(key, shape, BF16) for key, shape in zip(keys, shapes, strict=True))


def grid(**values: tuple) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def dequantize(name: str) -> Iterator[Tunable]:
    shape = product(name)

    def make(seed: int) -> tuple[NF4Array]:
        return (quantize_nf4(*normal(seed, (shape.out, shape.width))),)

    yield Tunable(
        "dequantize_nf4",
        {},
        unpack.TILES,
        grid(blocks=(32, 64, 128, 256), warps=(4, 8)),
        make,
        functools.partial(dequantize_nf4, implementation="triton"),
        functools.partial(dequantize_nf4, implementation="xla"),
        bound=0.0,
        workload=name,
    )


def matmul(name: str) -> Iterator[Tunable]:
    """Tiles of either pass, then whether the kernel with them or unpacking first is faster."""
    shape = product(name)
    for which, inner in (("forward", shape.width), ("input_gradient", shape.out)):
        key: dict[str, int | str] = {"tokens": bucket(shape.tokens), "out": shape.out, "width": shape.width}

        def make(seed: int, inner: int = inner) -> tuple[jax.Array, NF4Array]:
            x, w = normal(seed, (shape.tokens, inner), (shape.out, shape.width))
            return x, quantize_nf4(w)

        def reference(x: jax.Array, q: NF4Array, axis: int = int(which == "forward")) -> jax.Array:
            w = dequantize_nf4(q, F32, implementation="xla")
            return jax.lax.dot_general(x.astype(F32), w, (((1,), (axis,)), ((), ())), precision=EXACT)

        def run(x: jax.Array, q: NF4Array, implementation: str | None, which: str = which) -> jax.Array:
            if which == "forward":
                return nf4_matmul(x, q, implementation=implementation)
            like = jnp.zeros((x.shape[0], q.shape[1]), x.dtype)
            return jax.vjp(lambda like: nf4_matmul(like, q, implementation=implementation), like)[1](x)[0]

        x: Any = jax.ShapeDtypeStruct((shape.tokens, inner), BF16)
        packed = jax.eval_shape(quantize_nf4, jax.ShapeDtypeStruct((1, shape.out, shape.width), BF16))
        one = NF4Slice(packed, jnp.int32(0))
        default = fused.default_tiles(which, shape.tokens, shape.out, shape.width)
        by_kernel, chosen = (functools.partial(run, implementation=way) for way in ("triton", None))
        candidates = matmul_candidates(which, default)
        op = f"nf4_matmul.{which}"
        yield Tunable(f"{op}.tiles", key, default, candidates, make, by_kernel, reference, workload=name)
        if which == "forward" and nf4_mosaic.obstacle(x, [one]) is None:
            yield _mosaic_matmul(name, key, make, functools.partial(run, implementation="mosaic"), reference)
        ways = grid(implementation=("mosaic", "triton", "xla"))
        yield Tunable(op, key, default_way(which, x, [one]), ways, make, chosen, reference, workload=name)


def _mosaic_matmul(name: str, key: dict[str, int | str], make: Callable, run: Callable, reference: Callable) -> Tunable:
    shape = product(name)
    default = nf4_mosaic.default_tiles(shape.tokens, shape.out, shape.width, multiprocessors())
    sizes = tuple(sorted({default.tokens, max(16, default.tokens // 2)}))
    splits = tuple(sorted({1, max(1, default.splits // 2), default.splits, min(16, 2 * default.splits)}))
    candidates = grid(tokens=sizes, blocks=(1, 2), stages=(3, 4, 6), splits=splits)
    return Tunable("nf4_matmul.mosaic", key, default, candidates, make, run, reference, workload=name)


def matmul_candidates(which: str, default: fused.Tiles) -> list[dict[str, Any]]:
    """Around the default: strips of as many tokens or half, other steps, sums in one part or in more; and wide ones."""
    wide, narrow = default.tokens, max(16, default.tokens // 2)
    splits = tuple(sorted({1, default.splits, 2 * default.splits}))
    if which == "forward":
        shapes = grid(tokens=(wide,), rows=(128,), blocks=(1, 2), warps=(8,), splits=splits[:2])
        if wide == 128:
            shapes += grid(tokens=(256,), rows=(128,), blocks=(1, 2), warps=(8,), splits=splits[:1])
        return [
            *shapes,
            *grid(tokens=(narrow,), rows=(64,), blocks=(2,), warps=(4,), stages=(3, 4), splits=splits[-1:]),
        ]
    shapes = grid(tokens=(wide,), rows=(32, 64), blocks=(4,), warps=(8,), splits=splits[:2])
    return [*shapes, *grid(tokens=(narrow, wide), rows=(32,), blocks=(2,), warps=(4,), stages=(4,), splits=splits[-1:])]


def tiles_of_attention(name: str) -> Iterator[Tunable]:
    """Triton's, and on Hopper Mosaic's."""
    depth = attention(name).depth
    shape: dict[str, int | str] = {"depth": max(64, triton.padded_depth(depth))}
    queries = grid(queries=(64, 128), keys=(32, 64), warps=(4, 8), stages=(2,))
    keys = grid(queries=(32, 64), keys=(64, 128), warps=(4, 8), stages=(2,))
    for kernel, candidates in (("forward", queries), ("keys", keys), ("queries", queries)):
        default = triton.default_tiles(kernel, depth, cuda_capability())
        yield _attention(name, f"triton.{kernel}", shape, default, candidates, "triton", kernel != "forward")
    if _mosaic_runs(name):
        steps, default = grid(step=(64, 128), stages=(2, 3, 4)), mosaic.default_tiles(depth)
        yield _attention(name, "mosaic.forward", {"depth": depth}, default, steps, "mosaic", False)
        if depth in mosaic_backward.QUERIES_TILES:
            own: tuple[Any, ...] = (mosaic_backward.QUERIES_TILES[depth], steps, "mosaic", True)
            yield _attention(name, "mosaic.queries", {"depth": depth}, *own)
            own = (mosaic_backward.KEYS_TILES[depth], steps, "mosaic", True)
            yield _attention(name, "mosaic.keys", {"depth": depth}, *own)


def backward_of_attention(name: str) -> Iterator[Tunable]:
    """Whose pass follows Mosaic's forward pass at a length, where there is something to choose."""
    shape = attention(name)
    if _mosaic_runs(name) and shape.depth in mosaic_backward.QUERIES_TILES:
        length = 1 << (shape.row_length.bit_length() - 1)
        default = AfterMosaic("cudnn" if shape.row_length >= LONG else "mosaic")
        ways, key = grid(implementation=("cudnn", "mosaic")), {"depth": shape.depth, "length": length}
        yield _attention(name, "after_mosaic", dict(key), default, ways, "mosaic", True)


def _mosaic_runs(name: str) -> bool:
    shape = attention(name)
    example: Any = jax.ShapeDtypeStruct((shape.rows, shape.row_length, shape.heads, shape.depth), BF16)
    return mosaic_obstacle(example, Options(True, None, None, shape.depth**-0.5)) is None


def _attention(
    name: str, op: str, key: dict[str, int | str], default: Any, candidates: list, implementation: str, backward: bool
) -> Tunable:
    shape = attention(name)
    if shape.row_length > 8192 or shape.documents > 1:
        raise ValueError(
            f"{name}: attention is tuned causal, at no more than 8192 positions, where its reference fits."
        )
    size = (shape.rows, shape.row_length)

    def make(seed: int) -> tuple[jax.Array, ...]:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        return normal(seed, *((*size, count, shape.depth) for count in heads))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, by: str) -> tuple[jax.Array, ...]:
        out, saved = attention_forward(q, k, v, implementation=by)
        return (out, *attention_backward(saved, g)) if backward else (out,)

    def reference(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v, g = (x.astype(F32) for x in arrays)
        return run(q, k, v, g, "xla")

    by = functools.partial(run, by=implementation)
    return Tunable(f"flash_attention.{op}", key, default, candidates, make, by, reference, workload=name)


def decoding(name: str) -> Iterator[Tunable]:
    """A position a row to a full cache, for each way to store one."""
    shape = attention(name)
    cached, depth = (shape.rows, shape.kv_heads, shape.row_length, shape.depth), decode.padded(shape.depth)
    lines = max(16, decode.padded(shape.heads // shape.kv_heads))
    lengths = jnp.full(shape.rows, shape.row_length - 1, jnp.int32)

    def make(seed: int, stored: Any) -> tuple:
        q, k, v = normal(seed, (shape.rows, 1, shape.heads, shape.depth), cached, cached)
        if jnp.dtype(stored) == BF16:
            return q, k, v, {}
        (k, k_scales), (v, v_scales) = quantized(k, stored), quantized(v, stored)
        return q, k, v, {"k_scales": k_scales, "v_scales": v_scales}

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, scales: dict[str, Any], implementation: str = "triton"
    ) -> jax.Array:
        return decode_attention(q, k, v, lengths, **scales, implementation=implementation)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, scales: dict[str, Any]) -> jax.Array:
        return run(q.astype(F32), k, v, scales, "xla")

    for stored in (BF16, jnp.int8, jnp.float8_e4m3fn):
        if storage_obstacle(stored):
            continue
        arguments = functools.partial(make, stored=stored)
        key: dict[str, int | str] = {"stored": "16 bits" if stored == BF16 else jnp.dtype(stored).name, "depth": depth}
        if decode.by_lanes(stored, shape.depth, shape.heads // shape.kv_heads):
            op, default = "decode_attention.lanes", decode.LANE_TILES
            candidates = grid(positions=(16, 32, 64), warps=(1,), stages=(1,), programs=(1056, 1584, 2112))
        else:
            op, default = "decode_attention.tiles", decode.default_tiles(stored, depth, lines)
            candidates = grid(positions=(64, 128), warps=(4,), stages=(2, 3), programs=(264, 396, 528))
            key["lines"] = lines
        yield Tunable(op, key, default, candidates, arguments, run, reference, workload=name)


def loss(name: str) -> Iterator[Tunable]:
    """The size of a chunk, and the tiles of the softmax that stays resident, of a frozen head."""
    shape = head(name)

    def make(seed: int) -> tuple[jax.Array, ...]:
        hidden, weight = normal(seed, (shape.tokens, shape.width), (shape.words, shape.width), scale=0.02)
        return 50 * hidden, weight, jax.random.randint(jax.random.key(seed), (shape.tokens,), 0, shape.words)

    def total(hidden: jax.Array, weight: jax.Array, labels: jax.Array, implementation: str) -> jax.Array:
        return linear_cross_entropy(hidden, weight, labels, implementation=implementation).sum()

    def reference(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = functools.partial(total, implementation="xla")
        return jax.value_and_grad(wide)(hidden.astype(F32), weight.astype(F32), labels)

    run = jax.value_and_grad(functools.partial(total, implementation="triton"))
    sizes = [{"bytes": size << 20} for size in (384, 512, 768, 896)]
    key: dict[str, int | str] = {"vocabulary": shape.words}
    yield Tunable("linear_cross_entropy.chunk", key, Limit(CHUNK_BYTES), sizes, make, run, reference, workload=name)


def activation(name: str) -> Iterator[Tunable]:
    shape = product(name)
    wide, narrow = (shape.tokens, shape.out), (shape.tokens, shape.out // 2)
    candidates = grid(block=(512, 1024, 2048, 4096), warps=(4, 8))

    def forward(gate_up: jax.Array, g: jax.Array, implementation: str) -> jax.Array:
        return swiglu.swiglu_forward(gate_up, implementation=implementation)

    def backward(gate_up: jax.Array, g: jax.Array, implementation: str) -> tuple[jax.Array, jax.Array]:
        return swiglu.swiglu_backward(gate_up, g, implementation=implementation)

    for which, function in (("forward", forward), ("backward", backward)):
        run, reference = (functools.partial(function, implementation=way) for way in ("triton", "xla"))
        yield Tunable(
            f"swiglu.{which}",
            {},
            swiglu.TILES,
            candidates,
            lambda seed: normal(seed, wide, narrow),
            run,
            reference,
            workload=name,
        )


OPS: dict[str, tuple[Callable[[str], Iterator[Tunable]], tuple[str, ...]]] = {
    "dequantize_nf4": (dequantize, ("llama3.1-8b/gate/1",)),
    "nf4_matmul": (matmul, tuple(f"llama3.1-8b/{part}/{tokens}" for part in LAYER for tokens in (64, 256))),
    "flash_attention": (tiles_of_attention, ("llama3.1-8b/attention/4x2048",)),
    "flash_attention_backward": (
        backward_of_attention,
        tuple(f"llama3.1-8b/attention/{size}" for size in ("8x1024", "4x2048", "2x4096", "1x8192")),
    ),
    "decode_attention": (decoding, ("llama3.1-8b/attention/8x32768",)),
    "linear_cross_entropy": (loss, ("llama3.1-8b/head/8192",)),
    "swiglu": (activation, ("llama3.1-8b/gate_up/16384",)),
}  # fmt: skip
