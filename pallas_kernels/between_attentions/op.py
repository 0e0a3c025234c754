"""From a layer's attention to the next layer's queries, keys and values, in one launch, for a few rows; without derivatives.

For a token's residual stream x and attention's output o, with packed weights that each have LoRA or not (W' = W + s B A):

    m = x + o Wo'^T        h = silu(u Wgate'^T) * (u Wup'^T), u = rms_norm(m)        y = m + h Wdown'^T
    qkv = v [Wq'; Wk'; Wv']^T, v = rms_norm(y), of the next layer

Each product is as in nf4.linears, but for the order of sums and LoRA's first product, which is rounded once.
The others of a launch's programs are waited for, so all must run at once: there is one for each multiprocessor at most.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.between_attentions.work import AT_ONCE, LayerWork, LowRank
from pallas_kernels.dispatch import choose_implementation, cuda_capability, multiprocessors
from pallas_kernels.low_rank import norm_and_project, project, swiglu_and_project
from pallas_kernels.low_rank.beside import Made
from pallas_kernels.nf4.array import NF4Array, NF4Slice
from pallas_kernels.nf4.codebook import NF4_LEVELS, dynamic_map
from pallas_kernels.nf4.grouped import LowRank as Factors
from pallas_kernels.nf4.grouped import linears
from pallas_kernels.nf4.grouped_launch import SLOTS, WARPS, work_of
from pallas_kernels.nf4.grouped_work import TILE, Work
from pallas_kernels.triton_call import has_room, triton_call, triton_obstacle

ROWS = 2  # at most, whose blocks are apart
TILES = 7  # of a turn, at most, whose sums are in registers
ADDING = 0.3  # a turn's end, in tiles
MPS = Path("/tmp/nvidia-mps/control")  # where its daemon listens unless told otherwise
COUNTS = 8  # numbers of a layer that programs count in, a line of them


class Layers(NamedTuple):
    """Of all L layers: packed weights of o, gate and up, down, and q, k and v, LoRA's factors of each group, and the norms
    before the MLP and before attention."""

    weights: tuple[Sequence[NF4Array], ...]
    factors: tuple[Factors | None, ...]
    mlp_norm: Float[Array, "L hidden"]
    qkv_norm: Float[Array, "L hidden"]
    eps: float


def new_counts(layers: int) -> Int[Array, "L counts"]:
    """What programs count in: for each token new ones, as each layer leaves its own behind."""
    return jnp.zeros((layers, COUNTS), jnp.int32)


def between_attentions(
    x: Float[Array, "m hidden"],
    o: Float[Array, "m width"],
    layers: Layers,
    layer: Int[Array, ""],
    counts: Int[Array, "L counts"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "m hidden"], Float[Array, "m outputs"], Int[Array, "L counts"]]:
    """(y, the next layer's qkv, counts). After the last layer qkv holds nothing of use.

    implementation: "triton" (one launch; `obstacle` says where) or "separate", by the ops that it stands for.
    """
    by_name = {"triton": obstacle(x, layers), "separate": None}
    if choose_implementation("between_attentions", implementation, by_name) == "separate":
        return *_separately(x, o, layers, layer), counts
    work = work_of_layer(x.shape[0], o.shape[1], layers, multiprocessors())
    assert work is not None
    return launch(x, o, layers, layer, counts, work)


def obstacle(x: Any, layers: Layers) -> str | None:
    """Why one launch cannot do it here for such rows, or None."""
    stacks = [stack for group in layers.weights for stack in group]
    if not all(isinstance(stack, NF4Array) for stack in stacks) or any(stack.layout != "rows" for stack in stacks):
        return "it takes packed weights in layout 'rows'"
    if x.shape[0] > ROWS or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes up to {ROWS} rows of bfloat16 or float16, not {x.shape} of {x.dtype}"
    if (other := triton_obstacle()) is not None:
        return other
    if (cuda_capability() or (0, 0)) < (9, 0) or not has_room():
        return "it needs a GPU of compute capability 9.0 or later (Hopper)"
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ or MPS.exists():
        return "its programs wait for each other, and under NVIDIA's MPS another process may keep some from running"
    if work_of_layer(x.shape[0], layers.weights[0][0].shape[-1], layers, multiprocessors()) is None:
        return "its products cannot be shared out evenly with these sizes"
    return None


def _separately(x: jax.Array, o: jax.Array, layers: Layers, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    def multiply(place: int, made: Made, index: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        (u, z), factors = made, layers.factors[place]
        group = [NF4Slice(stack, index) for stack in layers.weights[place]]
        return linears(u, group, z=z, b=factors and factors.b, layer=index, residual=residual)

    a = [factors and factors.a for factors in layers.factors]
    parts = [1 if each is None else each.b.shape[-1] // each.a.shape[1] for each in layers.factors]
    following = jnp.minimum(layer + 1, len(layers.mlp_norm) - 1)
    m = multiply(0, project(o, a[0], layer, parts=parts[0]), layer, x)
    gate_up = multiply(1, norm_and_project(m, layers.mlp_norm, layers.eps, a[1], layer), layer)
    y = multiply(2, swiglu_and_project(gate_up, a[2], layer, parts=parts[2]), layer, m)
    return y, multiply(3, norm_and_project(y, layers.qkv_norm, layers.eps, a[3], following), following)


def work_of_layer(rows: int, width: int, layers: Layers, most: int, warps: int = WARPS) -> LayerWork | None:
    """How the work is cut for up to so many programs, at the least cost; None if it cannot be."""
    options = list(_options(rows, layers, most, warps))
    if not options:
        return None
    _, count, products = min(options, key=lambda option: option[0])
    lows, first = [], 0
    for group, factors in zip(layers.weights, layers.factors, strict=True):
        lows.append(_low_rank(rows, group, factors, count, first))
        first += rows * lows[-1].pieces
    hidden = layers.weights[0][0].shape[-2]
    if hidden % (products[0].threads * AT_ONCE) or width % AT_ONCE:
        return None
    o, mlp, down, qkv = products
    low_o, low_mlp, low_down, low_qkv = lows
    return LayerWork(
        o=o,
        mlp=mlp,
        down=down,
        qkv=qkv,
        low_o=low_o,
        low_mlp=low_mlp,
        low_down=low_down,
        low_qkv=low_qkv,
        layers=layers.mlp_norm.shape[0],
        eps=layers.eps,
        programs=count,
    )


def _options(rows: int, layers: Layers, most: int, warps: int) -> Iterator[tuple[float, int, list[Work]]]:
    """(cost, programs, products), of each number of programs that all have turns of every product, and of both of the MLP's."""
    inner = layers.weights[1][0].shape[-2]
    for count in range(1, most + 1):
        products, cost = [], 0.0
        for place, group in enumerate(layers.weights):
            cuts = [(_cost(work), work) for work in _cuts(rows, group, count, warps, residual=place in (0, 2))]
            if place == 1:
                cuts = [(each, work) for each, work in cuts if inner % (TILE * work.per * count) == 0]
            if not cuts:
                break
            each, work = min(cuts, key=lambda cut: cut[0])
            products.append(work)
            cost += each
        if len(products) == len(layers.weights):
            yield cost, count, products


def _cost(work: Work) -> float:
    return -(-work.turns // work.programs) * (work.per * work.chunks / work.tall + ADDING) * work.chunk * work.tall


def _cuts(rows: int, group: Sequence[NF4Array], count: int, warps: int, residual: bool) -> Iterator[Work]:
    """With each number of tiles that a turn may have."""
    heights, blocks, first = [stack.shape[-2] for stack in group], group[0].shape[-1] // 64, group[0]
    cell = first.nested_cell[1] if first.nested_cell and first.nested_scales is not None else None
    tall = 1 if blocks % (4 * warps) == 0 else 2
    run = 4 // tall
    if blocks % (run * warps) or (cell or run) % run or any(height % TILE for height in heights):
        return
    if not first.double_quant or any(_packing(stack) != _packing(first) for stack in group):
        return
    whole = work_of(group, rows, count, 0, residual)
    for per in range(tall, min(TILES, warps) + 1, tall):
        if any(height % (TILE * per) for height in heights) or sum(heights) // (TILE * per) < count:
            continue
        yield dataclasses.replace(whole, warps=warps, run=run, tall=tall, per=per, programs=count, slots=SLOTS)


def _packing(stack: NF4Array) -> tuple:
    return stack.nested_map, stack.double_quant, stack.nested_cell, stack.shape[-1]


def _low_rank(rows: int, group: Sequence[NF4Array], factors: Factors | None, count: int, first: int) -> LowRank:
    """Slices of x are whole eights, and so many that no program has two while others have none."""
    width = group[0].shape[-1]
    if factors is None:
        return LowRank(rows, width, len(group), 0, 0, 1, first)
    ranks = factors.a.shape[1]
    possible = [n for n in (1, 2, 4, 8) if width % (n * AT_ONCE) == 0 and (n == 1 or n * ranks <= count)]
    return LowRank(rows, width, len(group), ranks // len(group), factors.b.shape[-1], possible[-1], first)


def launch(
    x: Float[Array, "m hidden"],
    o: Float[Array, "m width"],
    layers: Layers,
    layer: Int[Array, ""],
    counts: Int[Array, "L counts"],
    work: LayerWork,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.between_attentions.layer_kernels import between_attentions_kernel

    first, levels = layers.weights[0][0], jnp.asarray(NF4_LEVELS)
    nested_map = dynamic_map() if first.nested_map is None else np.array(first.nested_map, np.float32)
    pointers: list[Any] = []
    for stack in (stack for group in layers.weights for stack in group):
        nested = levels if stack.nested_scales is None else stack.nested_scales
        pointers += [stack.codes, stack.scales, nested, levels if stack.offset is None else stack.offset]
    for factors in layers.factors:
        pointers += [x, x] if factors is None else [factors.a, factors.b]
    summands = sum(low.rows * low.pieces for low in (work.low_o, work.low_mlp, work.low_down, work.low_qkv))

    def like_x(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, x.dtype)

    rows, hidden, inner = work.rows, work.hidden, work.inner
    *_, y, qkv, counted = triton_call(
        between_attentions_kernel,
        x,
        o,
        *pointers,
        layers.mlp_norm,
        layers.qkv_norm,
        levels,
        jnp.asarray(nested_map),
        layer[None],
        counts,
        out=(
            like_x(rows, hidden),
            like_x(rows, inner),
            like_x(rows, inner),
            like_x(work.programs, rows, hidden),
            jax.ShapeDtypeStruct((max(1, summands),), jnp.float32),
            like_x(rows, hidden),
            like_x(rows, work.qkv.outputs),
            jax.ShapeDtypeStruct(counts.shape, counts.dtype),
        ),
        grid=(work.programs,),
        num_warps=work.o.warps,
        num_stages=1,
        aliases={len(pointers) + 7: 7},
        W=work,
    )
    return y, qkv, counted
