"""The mean of block scales, rounded as the reference rounds it.

bitsandbytes takes it with PyTorch in float32, so its last bits depend on the order of the additions. Up to a size
PyTorch adds in one thread, in an order that is the same on all x86 CPUs; followed here, it gives the same mean to the
last bit:

    The numbers fill the rows of a table, 4 accumulators of 8 lanes a row (of 1 lane if there are fewer than 8 numbers).
    Rows are added up by sixteens, these sums again by sixteens, and so on; at each level a rest of fewer than 16 is
    added up by itself. The rests join from the lowest level up, leaving one row. Whole lanes that did not fill a row
    are added to its first accumulator, then the accumulators to each other. Last come, one by one, the single numbers
    that did not fill the lanes, and the lanes.

Larger matrices are split among however many threads there are. For these the sum is taken in float64, which no order
of float32 additions is far from.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.nf4.float_bits import round_to_f32

SPLIT_FROM = 32768  # numbers, from which PyTorch shares a sum among threads
LANES, ACCUMULATORS, GROUP = 8, 4, 16


def float32_mean(x: jax.Array) -> jax.Array:
    """The mean of x [n] >= 0, float64 that holds float32 values; call it inside `jax.enable_x64(True)`.

    A float32 sum may overflow where the mean does not, and the reference's offset is then infinite. This one is not.
    """
    if x.size >= SPLIT_FROM:
        return round_to_f32(jnp.mean(x))
    total = _sum_in_order(x)
    return round_to_f32(jnp.where(jnp.isinf(total), jnp.sum(x), total) / x.size)


def _sum_in_order(x: jax.Array) -> jax.Array:
    lanes = LANES if x.size >= LANES else 1
    vectors = x[: x.size // lanes * lanes].reshape(-1, lanes)
    singles = x[vectors.size :]
    whole = len(vectors) // ACCUMULATORS * ACCUMULATORS
    accumulators = _cascade(vectors[:whole].reshape(-1, ACCUMULATORS, lanes))
    first = _add_up(vectors[whole:], accumulators[0])
    return _add_up(_add_up(accumulators[1:], first), _add_up(singles, jnp.zeros((), x.dtype)))


def _cascade(rows: jax.Array) -> jax.Array:
    """[n, ...] -> [...], by groups of 16 and rests."""
    zero = jnp.zeros_like(rows, shape=rows.shape[1:])
    rests = []
    while len(rows) >= GROUP:
        whole = len(rows) // GROUP * GROUP
        rests.append(_add_up(rows[whole:], zero))
        groups = jnp.moveaxis(rows[:whole].reshape(-1, GROUP, *rows.shape[1:]), 1, 0)
        rows = _add_up(groups, jnp.zeros_like(groups[0]))
    return functools.reduce(_add, [*rests, _add_up(rows, zero)])


def _add_up(rows: jax.Array, start: jax.Array) -> jax.Array:
    """start + rows[0] + rows[1] + ..., in this order."""
    return lax.scan(lambda total, row: (_add(total, row), None), start, rows)[0]


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return round_to_f32(a + b)
