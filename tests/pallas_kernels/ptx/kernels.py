"""Runs the kernels whose PTX is partly their own, as they are compiled for Hopper, on a multiprocessor in numpy.

A process of its own, because the tests' process has Triton in interpreter mode.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import decode_attention, dispatch
from pallas_kernels.between_attentions import op as between
from pallas_kernels.decode_attention import op
from pallas_kernels.decode_attention.stack import quantized
from pallas_kernels.nf4 import dequantize_nf4, grouped_launch, quantize_nf4
from tests.pallas_kernels import ptx
from tests.pallas_kernels.between_attentions import expected as expected_layer
from tests.pallas_kernels.between_attentions import random_layers

KINDS = {  # as Triton calls dtypes
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
    "float8_e4m3fn": "fp8e4nv",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def machine_call(kernel, *arrays, out, grid, num_warps, num_stages=3, aliases=None, **constants):
    """triton_call's stand-in. Results begin as numbers that are none."""
    shapes = list(out) if isinstance(out, tuple | list) else [out]
    given = [np.array(array) for array in arrays]
    results = [np.frombuffer(b"\xff" * (s.size * s.dtype.itemsize), s.dtype).reshape(s.shape).copy() for s in shapes]
    for source, target in (aliases or {}).items():
        results[target] = given[source]
    names = [name for name in kernel.arg_names if name not in constants]
    pointers = dict(zip(names, given + results, strict=True))
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={
            name: f"*{KINDS[pointers[name].dtype.name]}" if name in pointers else "constexpr"
            for name in kernel.arg_names
        },
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in names},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx.launch(compiled.asm["ptx"], [*given, *results], grid)
    made = [jnp.asarray(each) for each in results]
    return made if isinstance(out, tuple | list) else made[0]


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def check(what: str, got: np.ndarray, expected: np.ndarray, bound: float) -> None:
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    print(what, f"{error:.1e}")
    assert error < bound, what


def check_linears(rows: int, heights: tuple[int, ...], width: int, programs: int) -> None:
    """Of the second layer of two, against float64."""
    rng, rank = np.random.default_rng(rows), 16
    layers = [[jnp.asarray(rng.normal(size=(height, width)), jnp.float32) for _ in range(2)] for height in heights]
    stacks = [jax.tree.map(lambda *a: jnp.stack(a), *map(quantize_nf4, each)) for each in layers]
    x, z = (jnp.asarray(rng.normal(size=(rows, n)), jnp.bfloat16) for n in (width, len(heights) * rank))
    b = jnp.asarray(rng.normal(size=(2, sum(heights), rank)), jnp.bfloat16)
    residual = jnp.asarray(rng.normal(size=(rows, sum(heights))), jnp.bfloat16)
    got = grouped_launch.launch(x, stacks, jnp.int32(1), z, b, residual, programs)
    expected, first = wide(residual), 0
    for i, (stack, height) in enumerate(zip(stacks, heights, strict=True)):
        own = slice(first, first + height)
        weight = wide(dequantize_nf4(jax.tree.map(lambda a: a[1], stack), jnp.float32))
        expected[:, own] += wide(x) @ weight.T + wide(z)[:, i * rank : (i + 1) * rank] @ wide(b)[1, own].T
        first += height
    check(f"linears {rows} {heights} {width}", wide(got), expected, 5e-3)


def check_lanes(stored: str, depth: int, new: int, window: int | None) -> None:
    """The pieces of decode_attention by single warps, against XLA's attention to the same codes."""
    rng, heads, kv_heads, capacity = np.random.default_rng(depth), 2, 1, 96
    lengths = jnp.asarray([61, 3], jnp.int32)
    q = jnp.asarray(rng.normal(size=(2, new, heads, depth)), jnp.bfloat16)
    (k, k_scales), (v, v_scales) = (
        quantized(jnp.asarray(rng.normal(size=(1, 2, kv_heads, capacity, depth)), jnp.float32), stored)
        for _ in range(2)
    )
    tiles = op.Tiles(32, warps=1, stages=1, programs=8)
    parts, lse = op.in_pieces(q, k, v, lengths, k_scales, v_scales, jnp.int32(0), depth**-0.5, window, tiles)
    weights = jax.nn.softmax(lse, axis=0)[..., None]
    got = jnp.sum(jnp.where(weights > 0, parts * weights, 0), axis=0)
    scales = {"k_scales": k_scales[0], "v_scales": v_scales[0]}
    attend = jax.jit(partial(decode_attention, sliding_window=window, implementation="xla"))
    expected = attend(q, k[0], v[0], lengths, **scales)
    check(f"lanes {stored} {depth} {new} {window}, {len(parts)} pieces", wide(got), wide(expected), 8e-3)


def check_layer(rows: int, hidden: int, inner: int, warps: int) -> None:
    """What comes between two attentions, by one program, which has nobody to wait for."""
    layers = random_layers(hidden, hidden, inner, 16, 16, jnp.bfloat16, copies=4)
    work = between.work_of_layer(rows, hidden, layers, 1, warps=warps)
    assert work is not None
    x, o = (jnp.asarray(np.random.default_rng(i).normal(size=(rows, hidden)), jnp.bfloat16) for i in range(2))
    y, qkv, counts = between.launch(x, o, layers, jnp.int32(0), between.new_counts(2), work)
    expected = expected_layer(x, o, layers, 0)
    check(f"layer {rows} {hidden} {inner}", wide(y), expected[0], 8e-3)
    check("its qkv", wide(qkv), expected[1], 8e-3)
    assert counts.sum(axis=1).tolist() == [7, 0]


def as_on_hopper() -> None:
    for module in (grouped_launch, op, between):
        module.triton_call = machine_call
    for module in (grouped_launch, dispatch):
        module.cuda_capability = lambda: (9, 0)
    grouped_launch.has_room = lambda: True
    between.TILES = 2  # of a turn at most: less to compile


if __name__ == "__main__":
    as_on_hopper()
    check_linears(2, (80,), 4096, 1)  # codes in bulk, more tiles than there are stages
    check_linears(8, (16,), 14336, 1)  # codes by loads, several chunks
    check_layer(1, 1024, 1024, 4)
    check_lanes("float8_e4m3fn", 128, 1, None)
    check_lanes("int8", 64, 2, 40)
