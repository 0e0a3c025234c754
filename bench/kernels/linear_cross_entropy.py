"""Loss of a Llama-3.1-8B head (8192 tokens, H 4096, V 128256) against the matrix products it cannot do without.

The ceiling is what cuBLAS needs for those products at full size, logits in bfloat16 and nothing else done: two with a
frozen head, one for the loss alone, four with a trained one, whose logits are made twice. All is timed in turns, a
round of each, as a card at its power limit slows down as it warms up. Extra memory is what the compiled program
allocates beside arguments and results. Before that each has to agree with all logits at once in float32.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels._check import agree, verified
from pallas_kernels import linear_cross_entropy
from pallas_kernels.workloads import HEAD, head

OP = "linear_cross_entropy"
SHAPE = head(HEAD)
TOKENS, WIDTH, WORDS = SHAPE.tokens, SHAPE.width, SHAPE.words
SHARES = (1.0, 0.5, 0.1)  # of rows with a label
ROUNDS = 7


def rows() -> Iterator[dict[str, Any]]:
    hidden, weight, labels = _inputs()
    exact = jax.jit(partial(_exact, trained=False))
    for share in SHARES:
        some = jnp.where(jnp.arange(TOKENS) * 7919 % TOKENS < share * TOKENS, labels, -100)
        functions = {name: _frozen(name) for name in ("triton", "xla")}
        if share == 1:
            functions["all logits at once"] = jax.value_and_grad(_dense)
        expected = exact(hidden, weight, some)
        case = f"frozen head, {share:.0%} labelled"
        yield from _measure(case, functions, (hidden, weight, some), expected, share, ("logits", "dx"))
    alone = {name: partial(_loss, name) for name in ("triton", "xla")}
    yield from _measure("loss alone", alone, (hidden, weight, labels), exact(hidden, weight, labels)[0], 1, ("logits",))
    trained = {name: _trained(name) for name in ("triton", "xla")}
    expected = jax.jit(partial(_exact, trained=True))(hidden, weight, labels)
    products = ("logits", "logits", "dx", "dw")
    yield from _measure("trained head", trained, (hidden, weight, labels), expected, 1, products)


def _inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH), jnp.bfloat16)
    weight = (0.02 * jax.random.normal(keys[1], (WORDS, WIDTH))).astype(jnp.bfloat16)
    return hidden, weight, jax.random.randint(keys[2], (TOKENS,), 0, WORDS)


def _loss(implementation: str, hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    return linear_cross_entropy(hidden, weight, labels, implementation=implementation).sum()


def _frozen(implementation: str) -> Callable:
    return jax.value_and_grad(partial(_loss, implementation))


def _trained(implementation: str) -> Callable:
    return jax.value_and_grad(partial(_loss, implementation), argnums=(0, 1))


def _dense(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    """What one would write by hand: all logits in float32."""
    logits = jax.lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    at_label = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - at_label).sum()


def _exact(hidden: jax.Array, weight: jax.Array, labels: jax.Array, trained: bool) -> tuple:
    """Loss and gradients in float32."""
    f32 = jnp.float32

    def loss(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        logits = jnp.matmul(hidden, weight.T, precision=jax.lax.Precision.HIGHEST)
        real = labels >= 0
        at_label = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[:, None], axis=1)[:, 0]
        return jnp.where(real, jax.nn.logsumexp(logits, axis=1) - at_label, 0).sum()

    wanted = (0, 1) if trained else 0
    return jax.value_and_grad(loss, argnums=wanted)(hidden.astype(f32), weight.astype(f32))


def _compiled(function: Callable, *arguments: jax.Array) -> tuple[Callable[[], Any], int]:
    """A call without arguments, and the bytes it allocates."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return lambda: program(*arguments), memory.temp_size_in_bytes


PRODUCTS = {"logits": (1, 1), "dx": (1, 0), "dw": (0, 0)}


def _products(count: int, names: tuple[str, ...]) -> list[Callable[[], Any]]:
    """cuBLAS calls for so many rows."""
    hidden, weight, _ = _inputs()
    ds = jax.random.normal(jax.random.key(1), (count, WORDS), jnp.bfloat16)
    operands = {"logits": (hidden[:count], weight), "dx": (ds, weight), "dw": (ds, hidden[:count])}

    def product(name: str) -> Callable[[], Any]:
        x, y = PRODUCTS[name]
        dot = partial(jax.lax.dot_general, dimension_numbers=(((x,), (y,)), ((), ())))
        return _compiled(partial(dot, preferred_element_type=jnp.bfloat16), *operands[name])[0]

    return [product(name) for name in names]


def _measure(
    case: str,
    functions: dict[str, Callable],
    arguments: tuple[jax.Array, ...],
    expected: Any,
    share: float,
    products: tuple[str, ...],
) -> list[dict[str, Any]]:
    count = round(share * TOKENS)
    extra: dict[str, int] = {}

    def compile_and_run(name: str) -> Any:
        calls[name], extra[name] = _compiled(functions[name], *arguments)
        return calls[name]()

    calls: dict[str, Callable[[], Any]] = {}
    compiling = {name: partial(compile_and_run, name) for name in functions}
    able, failed = verified(OP, case, compiling, lambda result: agree(result, expected))
    seconds = _in_turns({name: [calls[name]] for name in able} | {"ceiling": _products(count, products)})
    work = 2 * count * WIDTH * WORDS * len(products) * 1e-12
    ceiling = work / seconds.pop("ceiling")
    return failed + [
        {
            "op": OP,
            "case": case,
            "implementation": name,
            "us": round(1e6 * taken, 1),
            "TFLOP/s": round(work / taken, 1),
            "ceiling": round(ceiling, 1),
            "ratio": round(work / taken / ceiling, 3),
            "extra_MiB": round(extra[name] / 2**20),
            "flops_per_byte": round(work * 1e12 / _least_bytes(count, len(products))),
        }
        for name, taken in seconds.items()
    ]


def _least_bytes(count: int, products: int) -> int:
    """Weight and hidden once for each product, in bfloat16."""
    return 2 * products * (WORDS * WIDTH + count * WIDTH)


def _in_turns(calls: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Median seconds of each group of calls; milliseconds long, so that the host's part of them does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, group in calls.items():
            start = time.perf_counter()
            jax.block_until_ready([call() for call in group])
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}
