"""A frozen linear with packed weights and LoRA of rank 16, against a plain bfloat16 product without either.

x (or the cotangent g) has room at the end of its rows, where the low-rank operand is put in place, and the weights are
unpacked into room for the other factor, as in a model's step: one product then makes x W^T + z B, or g W + dz A. `mosaic`
and `triton` are the kernels that decode in registers, the latter of weights packed as one matrix, with the same room;
`chosen` is what a step chooses for the shape. The ratio is the plain product's time over ours, in turns; three weights
take turns, so that none is found in the cache.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels._check import agree, verified
from bench.kernels.timing import times_in_turns
from pallas_kernels.low_rank import project_into, room_for
from pallas_kernels.nf4 import NF4Array, NF4Slice, dequantize_nf4, quantize_nf4
from pallas_kernels.nf4.products import input_gradient, product, way_of
from pallas_kernels.workloads import PRODUCTS, Product
from pallas_kernels.workloads import product as shape_of

OP, DENSE = "nf4_matmul", "bfloat16 weight"
RANK, COPIES, CHECKED = 16, 3, 64
PASSES = ("forward", "input gradient")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """Stacks [COPIES, height, width] one below the other, and LoRA's factors as one product takes them."""

    stacks: list[NF4Array]
    a: jax.Array  # [width, R]
    b: jax.Array  # [R, out]
    scales: jax.Array  # [R]


def rows(names: tuple[str, ...] = PRODUCTS) -> Iterator[dict[str, Any]]:
    for shape in map(shape_of, names):
        matrices, whole, a, b, dense = _drawn(shape)
        scales = jnp.full(a.shape[1], 2.0, jnp.float32)
        linear, one = (Linear([quantize_nf4(each) for each in some], a, b, scales) for some in (matrices, [whole]))
        for which in PASSES:
            yield from _measure(shape, which, linear, one, dense)


@partial(jax.jit, static_argnums=0)
def _drawn(shape: Product) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """COPIES of random weights of the shape's heights, and of one as high as all; LoRA's factors; dense weights."""
    keys, rank = iter(jax.random.split(jax.random.key(0), len(shape.heights) + 3 + COPIES)), RANK * len(shape.heights)

    def normal(*size: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), size, jnp.bfloat16)

    matrices = [normal(COPIES, height, shape.width) for height in shape.heights]
    owner = np.repeat(np.arange(len(shape.heights)), shape.heights)
    b = jnp.where(np.arange(rank)[:, None] // RANK == owner[None], normal(rank, shape.out), 0)  # a linear's own columns
    dense = [normal(shape.out, shape.width) for _ in range(COPIES)]
    return matrices, normal(COPIES, shape.out, shape.width), normal(shape.width, rank), b, dense


def _product(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=x.dtype)


def call_of(which: str, way: str) -> Callable:
    """(operand with room, linear, index of its weight) -> (result, the operand with z or dz in its room)."""

    def run(operand: jax.Array, linear: Linear, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        slices = [NF4Slice(stack, index) for stack in linear.stacks]
        if which == "forward":
            operand = project_into(operand, linear.a, linear.scales)
            return product(operand, slices, linear.b.T, way=way), operand
        operand = project_into(operand, linear.b.T, linear.scales)
        return input_gradient(operand, slices, linear.a.T, way=way), operand

    return run


class Turns:
    """A call without arguments: the operand, which each call is given and gives back, and the weights in turns."""

    def __init__(self, function: Callable, operand: jax.Array, linear: Linear) -> None:
        self.program = jax.jit(function, donate_argnums=0)
        self.operand = jnp.array(operand)  # a copy: this one is given away
        self.linear, self.turn = linear, itertools.cycle([jnp.int32(i) for i in range(COPIES)])

    def __call__(self) -> jax.Array:
        result, self.operand = self.program(self.operand, self.linear, next(self.turn))
        return result


def _measure(shape: Product, which: str, linear: Linear, one: Linear, dense: list[jax.Array]) -> list[dict[str, Any]]:
    case, axis = f"{shape.name} {which}", int(which == "forward")
    width = shape.width if axis else shape.out
    operand = jax.random.normal(jax.random.key(7), (shape.tokens, width + room_for(linear.a.shape[1])), jnp.bfloat16)
    checked = slice(None, None, -(-shape.tokens // CHECKED))
    way = way_of(which.replace(" ", "_"), operand, [NF4Slice(stack, jnp.int32(0)) for stack in linear.stacks])
    ways = {"chosen": way, "mosaic": "mosaic", "triton": "triton"}
    if not axis:
        del ways["mosaic"]
    calls, failed = {}, []
    for name, own in ways.items():
        weights = one if own == "triton" else linear
        expected = _exact(operand[checked, :width], weights, axis)
        turns = {name: Turns(call_of(which, own), operand, weights)}
        able, wrong = verified(OP, case, turns, lambda result: agree(result[checked], expected))  # noqa: B023
        calls |= able
        failed += wrong
    plain, weights = jax.jit(partial(_product, axis=axis)), itertools.cycle(dense)
    operand = operand[:, :width]
    seconds = times_in_turns(calls | {DENSE: lambda: plain(operand, next(weights))})
    rate = shape.flops / seconds[DENSE] / 1e12
    moved = sum(stack.nbytes for stack in linear.stacks) // COPIES + 2 * shape.tokens * (shape.width + shape.out)
    return failed + [
        {
            "op": OP,
            "case": case,
            "implementation": name,
            "us": round(1e6 * each, 1),
            "TFLOP/s": round(shape.flops / each / 1e12, 1),
            "ceiling": round(rate, 1),
            "ratio": round(seconds[DENSE] / each, 3),
            "flops_per_byte": round(shape.flops / moved, 1),
        }
        for name, each in seconds.items()
    ]


def _first(stack: NF4Array) -> NF4Array:
    return jax.tree.map(lambda leaf: leaf[0], stack)


@partial(jax.jit, static_argnums=2)
def _exact(operand: jax.Array, linear: Linear, axis: int) -> jax.Array:
    """In float32, of the first of the weights."""
    f32, exact = jnp.float32, jax.lax.Precision.HIGHEST
    weight = jnp.concatenate([dequantize_nf4(_first(each), f32, implementation="xla") for each in linear.stacks])
    a, b, x = linear.a.astype(f32), linear.b.astype(f32), operand.astype(f32)
    low_rank = jnp.matmul(a * linear.scales[None], b, precision=exact).T  # [out, width]
    return jax.lax.dot_general(x, weight + low_rank, (((1,), (axis,)), ((), ())), precision=exact)
