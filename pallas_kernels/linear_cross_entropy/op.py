"""Cross entropy of a linear head's logits, which never stand in memory whole.

For hidden row x with label y, logits t_v = w_v.x (capped: t_v = c tanh(w_v.x / c)), V words, smoothing e and z-loss z:

    lse = log sum_v exp t_v          loss = lse - (1 - e) t_y - (e / V) sum_v t_v + z lse^2

and with p_v = exp(t_v - lse), the gradient per unit of the row's cotangent g:

    dt_v = (1 + 2 z lse) p_v - (1 - e) [v = y] - e / V          ds_v = dt_v (1 - t_v^2 / c^2)
    dx = g sum_v ds_v w_v                                       dw_v = sum over rows of g ds_v x

Rows without a label cost nothing: the labelled ones are packed to the front and walked in chunks (`chunks`). For each
chunk XLA's matmul makes float32 logits, `softmax` or the Triton kernels make statistics and ds of them, and ds, rounded
to hidden's dtype, goes into the next matmul. Sums are float32 throughout; logits are never rounded to 16 bits, which
would cost the loss its third digit.

A frozen head needs dx alone, which is known up to the factor g as soon as the logits are: the forward pass makes it
then, two matrix products in all. Saved: dx per unit of g, in hidden's dtype, and nothing else. A trained head needs dw
as well, into which g enters row by row, so its backward pass makes the logits again: four products. Saved: hidden,
weight, labels, lse. Which of the two it is JAX says (`symbolic_zeros`); a call that is not differentiated does one
product.

A frozen head, 8192 rows, H 4096, V 128256 on an H200: 27.7 ms, where cuBLAS, in turns with it, takes 24.9 for the two
products alone. In a profile the logits are 10.8 ms, dx 10.4, the softmax 8 x 0.24 at 6 bytes moved a logit, gathering
and bringing back rows 0.3; the rest is the card's power limit. The host's look at the number of labelled rows before
each chunk is lost in the noise, a loop of fixed length was no faster. Nor were twice the rows a chunk; half as many
were 7 % slower.

With `axis_name` each device of that mesh axis holds a part of the words: log-sum-exp, the label's logit and dx are
combined over the axis, all else stays where it is.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import check_floats, choose_implementation, exact_precision
from pallas_kernels.linear_cross_entropy import softmax, triton_softmax
from pallas_kernels.linear_cross_entropy.chunks import Chunk, chunk_rows, for_each_chunk, pack, unpack, write
from pallas_kernels.linear_cross_entropy.options import Options
from pallas_kernels.linear_cross_entropy.softmax import Statistics
from pallas_kernels.triton_call import triton_obstacle

SOFTMAX = {"triton": triton_softmax, "xla": softmax}


def linear_cross_entropy(
    hidden: Float[Array, "T H"],
    weight: Float[Array, "V H"],
    labels: Int[Array, "T"],
    *,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "T"]:
    """Per row, -log softmax(hidden weight^T) at its label, in float32; 0 where the label is `ignore_index`.

    The weight is used in hidden's dtype, its gradient is summed in float32 and returned in the weight's own. `soft_cap`
    bounds the logits, `label_smoothing` spreads that share of the target over all words, `z_loss` adds its multiple of
    the squared log-sum-exp. A label outside [0, V) that is not `ignore_index` makes loss and gradients NaN.

    Inside `shard_map`, `axis_name` says over which mesh axis the rows of the head are divided: device i holds words
    [i V, (i + 1) V) and all devices of the axis the same hidden and labels (which count words of the whole head); loss
    and gradient of hidden come out the same on all of them. Differentiate inside the `shard_map`, or leave its
    `check_vma` on.
    """
    obstacles = {"triton": triton_obstacle(), "xla": None}
    implementation = choose_implementation("linear_cross_entropy", implementation, obstacles)
    check_floats("linear_cross_entropy", hidden=hidden, weight=weight)
    if hidden.ndim != 2 or weight.shape[1:] != hidden.shape[1:] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"{hidden.shape=}, {weight.shape=}, {labels.shape=} must be [T, H], [V, H] and [T].")
    if not weight.shape[0]:
        raise ValueError(f"{weight.shape=} must be [V, H] of at least one word.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{labels.dtype=} must be an integer type.")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{soft_cap=} must be positive and finite; use None for no cap.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{label_smoothing=} must be at least 0 and less than 1.")
    if not math.isfinite(z_loss):
        raise ValueError(f"{z_loss=} must be finite; 0 is none.")
    words = weight.shape[0]
    options = Options(
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocabulary=words if axis_name is None else words * jax.lax.axis_size(axis_name),
        axis_name=axis_name,
        chunk=chunk_rows(hidden.shape[0], words, hidden.dtype.itemsize),
        implementation=implementation,
    )
    return _loss(hidden, weight, _as_wide(labels), options)


def linear_cross_entropy_reference(
    hidden: Float[Array, "T H"], weight: Float[Array, "V H"], labels: Int[Array, "T"], options: Options
) -> Float[Array, "T"]:
    """The same math in the dtype of its arguments, all logits at once."""
    logits = hidden @ weight.T
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    lse = jax.nn.logsumexp(logits, axis=1)
    within = (labels >= 0) & (labels < weight.shape[0])
    at_label = jnp.take_along_axis(logits, jnp.where(within, labels, 0)[:, None], axis=1)[:, 0]
    loss = lse - (1 - options.label_smoothing) * at_label - options.label_smoothing * jnp.mean(logits, axis=1)
    loss += options.z_loss * lse**2
    return jnp.where(labels == options.ignore_index, 0, jnp.where(within, loss, jnp.nan))


def _matmul(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contract one axis of each of two matrices of one dtype into float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)


def _as_wide(labels: jax.Array) -> jax.Array:
    """In 32 bits at least: a narrow type can hold neither the number of words nor, perhaps, `ignore_index`."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def _is_word(labels: jax.Array, options: Options) -> jax.Array:
    return (labels >= 0) & (labels < options.vocabulary)


def _own_labels(labels: jax.Array, words: int, options: Options) -> jax.Array:
    """Labels counted from this device's first word; negative where they are no word at all."""
    own = jnp.where(_is_word(labels, options), labels, -1).astype(jnp.int32)
    return own if options.axis_name is None else own - words * jax.lax.axis_index(options.axis_name)


def _unit_scale(labels: jax.Array, options: Options) -> jax.Array:
    """1 for each row, NaN where its label is no word."""
    return jnp.where(_is_word(labels, options), jnp.float32(1), jnp.nan)


def _combined(statistics: Statistics, options: Options) -> Statistics:
    """Statistics of all words, from those of each device's."""
    if options.axis_name is None:
        return statistics
    lse, at_label, total = statistics
    top = jax.lax.pmax(lse, options.axis_name)
    mass, at_label, total = jax.lax.psum((jnp.exp(lse - top), at_label, total), options.axis_name)
    return Statistics(top + jnp.log(mass), at_label, total)


def _empty(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.Array:
    """Zeros; in a `shard_map` they vary over the mesh axes that any of `like` varies over, as a loop's carry must."""
    first, *others = (jax.lax.full_like(array, 0, dtype, shape) for array in like)
    return sum(others, first)


def _rows_like(hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options) -> tuple[jax.Array, ...]:
    """What a result of each row depends on; with the words divided it is combined, and no longer differs with them."""
    return (hidden, weight, labels) if options.axis_name is None else (hidden, labels)


def _losses(packed: Statistics, packing, labels: jax.Array, options: Options) -> jax.Array:
    lse, at_label, total = (unpack(each, packing) for each in packed)
    loss = lse - options.peak * at_label
    if options.label_smoothing:
        loss -= options.uniform * total
    if options.z_loss:
        loss += options.z_loss * lse**2
    loss = jnp.where(_is_word(labels, options), loss, jnp.nan)
    return jnp.where(labels == options.ignore_index, 0, loss)


def _losses_and_lse(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The losses [T] and log-sum-exps [T] (0 for rows without a label)."""
    weight = weight.astype(hidden.dtype)
    own_labels = _own_labels(labels, weight.shape[0], options)
    packing = pack(labels != options.ignore_index, options.chunk)

    def one_chunk(chunk: Chunk, start: jax.Array, packed: Statistics) -> Statistics:
        logits = _matmul(chunk.of(hidden), weight, (1, 1))
        rows = SOFTMAX[options.implementation].row_statistics(logits, chunk.of(own_labels), options)
        return Statistics(*(write(a, b, start) for a, b in zip(packed, _combined(rows, options), strict=True)))

    like = _rows_like(hidden, weight, labels, options)
    packed = Statistics(*[_empty(packing.order.shape, jnp.float32, *like)] * 3)
    packed = for_each_chunk(packing, options.chunk, one_chunk, packed)
    return _losses(packed, packing, labels, options), unpack(packed.lse, packing)


def _losses_and_unit_dx(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The losses [T] and dx [T, H] for cotangents of 1."""
    weight = weight.astype(hidden.dtype)
    own_labels, scale = _own_labels(labels, weight.shape[0], options), _unit_scale(labels, options)
    packing = pack(labels != options.ignore_index, options.chunk)
    implementation = SOFTMAX[options.implementation]

    def one_chunk(chunk: Chunk, start: jax.Array, carry: tuple[Statistics, jax.Array]) -> tuple[Statistics, jax.Array]:
        packed, dx = carry
        logits = _matmul(chunk.of(hidden), weight, (1, 1))
        rows = logits, chunk.of(own_labels), chunk.of(scale)
        if options.axis_name is None:
            statistics, ds = implementation.statistics_and_gradients(*rows, hidden.dtype, options)
        else:
            statistics = _combined(implementation.row_statistics(*rows[:2], options), options)
            ds = implementation.logit_gradients(*rows, statistics.lse, hidden.dtype, options)
        packed = Statistics(*(write(a, b, start) for a, b in zip(packed, statistics, strict=True)))
        return packed, write(dx, _dx(ds, weight, options).astype(hidden.dtype), start)

    places, like = packing.order.shape[0], _rows_like(hidden, weight, labels, options)
    packed = Statistics(*[_empty((places,), jnp.float32, *like)] * 3)
    carry = packed, _empty((places, hidden.shape[1]), hidden.dtype, *like)
    packed, dx = for_each_chunk(packing, options.chunk, one_chunk, carry)
    return _losses(packed, packing, labels, options), unpack(dx, packing)


def _dx(ds: jax.Array, weight: jax.Array, options: Options) -> jax.Array:
    dx = _matmul(ds, weight, (1, 0))
    return dx if options.axis_name is None else jax.lax.psum(dx, options.axis_name)


def _dx_and_dweight(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, lse: jax.Array, g: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    # Cotangents as small as 1 / (number of tokens) would drown ds in float16: they are scaled to at most 1.
    largest = jnp.max(jnp.abs(g), initial=0)
    unit = jnp.where(largest == 0, 1, largest)
    used = weight.astype(hidden.dtype)
    own_labels, scale = _own_labels(labels, weight.shape[0], options), g / unit * _unit_scale(labels, options)
    packing = pack(labels != options.ignore_index, options.chunk)

    def one_chunk(chunk: Chunk, start: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dweight, dx = carry
        x = chunk.of(hidden)
        rows = _matmul(x, used, (1, 1)), chunk.of(own_labels), chunk.of(scale), chunk.of(lse)
        ds = SOFTMAX[options.implementation].logit_gradients(*rows, hidden.dtype, options)
        dx = write(dx, (_dx(ds, used, options) * unit).astype(hidden.dtype), start)
        return dweight + _matmul(ds, x, (0, 0)), dx

    dweight = _empty(weight.shape, jnp.float32, hidden, weight, labels, g)
    like = *_rows_like(hidden, weight, labels, options), g
    dx = _empty((packing.order.shape[0], hidden.shape[1]), hidden.dtype, *like)
    dweight, dx = for_each_chunk(packing, options.chunk, one_chunk, (dweight, dx))
    return unpack(dx, packing), (dweight * unit).astype(weight.dtype)


def _forward(hidden, weight, labels, options: Options) -> tuple[jax.Array, tuple]:
    """Each array arrives with the word whether it is differentiated."""
    arrays = (hidden.value, weight.value, labels.value)
    if weight.perturbed:
        losses, lse = _losses_and_lse(*arrays, options)
        return losses, (*arrays, lse)
    losses, unit_dx = _losses_and_unit_dx(*arrays, options)
    return losses, (unit_dx,)


def _backward(options: Options, saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None
    if len(saved) == 1:
        (unit_dx,) = saved
        return (unit_dx.astype(jnp.float32) * g[:, None]).astype(unit_dx.dtype), None, None
    hidden, weight, labels, lse = saved
    return *_dx_and_dweight(hidden, weight, labels, lse, g, options), None


def _primal(hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options) -> jax.Array:
    return _losses_and_lse(hidden, weight, labels, options)[0]


_loss = jax.custom_vjp(_primal, nondiff_argnums=(3,))
_loss.defvjp(_forward, _backward, symbolic_zeros=True)
