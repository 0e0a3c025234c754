"""A token's layer but its attention, in one launch, against the launches that it stands for; bytes are the packed weights'.

Four layers take turns, so that no weight is found in the cache. LoRA has rank 16 on all projections. Gaps between launches are
not counted (see timing), of which the others leave nine.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._check import agree, verified
from bench.kernels.dequantize_nf4 import row
from bench.kernels.timing import times_in_turns
from pallas_kernels.between_attentions import Factors, Layers, between_attentions, new_counts
from pallas_kernels.nf4 import NF4Array, quantize_nf4

OP = "between_attentions"
SIZES = {"llama3.1-8b": (4096, 14336, 1024)}  # hidden, of the MLP, of keys
ROWS = (1, 2)
LAYERS, RANK = 4, 16
EPS = 1e-5


def rows() -> list[dict[str, Any]]:
    return [
        row for name, sizes in SIZES.items() for count in ROWS for row in measure(f"{count} x {name}", count, *sizes)
    ]


def measure(case: str, count: int, hidden: int, inner: int, keys: int) -> list[dict[str, Any]]:
    layers = random_layers(hidden, inner, keys)
    x, o = (jax.random.normal(jax.random.key(i), (count, hidden), jnp.bfloat16) for i in range(2))

    def run(name: str, x: jax.Array, o: jax.Array, arrays: tuple, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = Layers(*arrays, eps=EPS)
        return between_attentions(x, o, each, layer, new_counts(LAYERS), implementation=name)[:2]

    arrays = tuple(layers)[:-1]
    programs = {name: jax.jit(partial(run, name)) for name in ("triton", "separate")}
    calls = {name: partial(program, x, o, arrays, jnp.int32(0)) for name, program in programs.items()}
    able, failed = verified(OP, case, calls, partial(agree, expected=calls["separate"]()))
    in_turn = {name: _each_layer(partial(programs[name], x, o, arrays)) for name in able}
    moved = sum(stack.nbytes for group in layers.weights for stack in group) // LAYERS
    return failed + [row(OP, case, name, seconds, moved) for name, seconds in times_in_turns(in_turn).items()]


def _each_layer(call: Any) -> Any:
    """The same for one layer after the other but the last, after which there is no next one's q/k/v."""
    layers = [jnp.int32(i) for i in range(LAYERS - 1)]
    turn = iter(range(2**62))
    return lambda: call(layers[next(turn) % len(layers)])


def random_layers(hidden: int, inner: int, keys: int) -> Layers:
    """Random codes: what normal weights pack to. The others are of a size that keeps numbers as large as they are."""

    def stack(out: int, width: int) -> NF4Array:
        one = quantize_nf4(jax.random.normal(jax.random.key(out), (out, width), jnp.bfloat16) / width**0.5)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * LAYERS), one)

    groups = (
        [stack(hidden, hidden)],
        [stack(inner, hidden), stack(inner, hidden)],
        [stack(hidden, inner)],
        [stack(hidden, hidden), stack(keys, hidden), stack(keys, hidden)],
    )

    def factors(group: list[NF4Array]) -> Factors:
        width, out = group[0].shape[-1], sum(each.shape[-2] for each in group)
        a = jax.random.normal(jax.random.key(1), (LAYERS, len(group) * RANK, width), jnp.bfloat16) / width**0.5
        b = jax.random.normal(jax.random.key(2), (LAYERS, out, RANK), jnp.bfloat16) / RANK
        return Factors(a, b)

    norms = [jax.random.uniform(jax.random.key(i), (LAYERS, hidden), jnp.bfloat16, 0.5, 2) for i in (3, 4)]
    return Layers(groups, tuple(factors(group) for group in groups), *norms, eps=EPS)
