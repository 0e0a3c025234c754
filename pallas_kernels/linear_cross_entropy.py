"""Cross entropy of a linear head's logits, which never stand in memory whole.

For hidden row x with label y, logits t_v = w_v.x (capped: t_v = c tanh(w_v.x / c)), V words, smoothing e and z-loss z:

    lse = log sum_v exp t_v          loss = lse - (1 - e) t_y - (e / V) sum_v t_v + z lse^2

and with p_v = exp(t_v - lse), the gradient per unit of the row's cotangent g:

    dt_v = (1 + 2 z lse) p_v - (1 - e) [v = y] - e / V          ds_v = dt_v (1 - t_v^2 / c^2)
    dx = g sum_v ds_v w_v                                       dw_v = sum over rows of g ds_v x

Rows are taken in chunks whose logits, in float32, fill at most CHUNK_BYTES. The operands of every matrix product have
hidden's dtype, sums are float32.

A frozen head needs dx alone, which is known up to the factor g as soon as the logits are: the forward pass makes it
then, two matrix products in all. Saved: dx per unit of g, in hidden's dtype, and nothing else. A trained head needs dw
as well, into which g enters row by row, so its backward pass makes the logits again: four products. Saved: hidden,
weight, labels. Which of the two it is JAX says (`symbolic_zeros`); a call that is not differentiated does one product.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, exact_precision

CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Options:
    """All of a call that is not an array."""

    ignore_index: int
    soft_cap: float | None
    label_smoothing: float
    z_loss: float
    chunk: int  # rows


def linear_cross_entropy(
    hidden: Float[Array, "T H"],
    weight: Float[Array, "V H"],
    labels: Int[Array, "T"],
    *,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "T"]:
    """Per row, -log softmax(hidden weight^T) at its label, in float32; 0 where the label is `ignore_index`.

    The weight is used in hidden's dtype, its gradient is summed in float32 and returned in the weight's own. `soft_cap`
    bounds the logits, `label_smoothing` spreads that share of the target over all words, `z_loss` adds its multiple of
    the squared log-sum-exp. A label outside [0, V) that is not `ignore_index` makes loss and gradients NaN.
    """
    choose_implementation("linear_cross_entropy", implementation, {"xla": None})
    if hidden.ndim != 2 or weight.shape[1:] != hidden.shape[1:] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"{hidden.shape=}, {weight.shape=}, {labels.shape=} must be [T, H], [V, H] and [T].")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{labels.dtype=} must be an integer type.")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"{soft_cap=} must be positive; use None for no cap.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{label_smoothing=} must be at least 0 and less than 1.")
    chunk = _chunk_rows(hidden.shape[0], weight.shape[0])
    return _loss(hidden, weight, labels, Options(ignore_index, soft_cap, label_smoothing, z_loss, chunk))


def linear_cross_entropy_reference(
    hidden: Float[Array, "T H"], weight: Float[Array, "V H"], labels: Int[Array, "T"], options: Options
) -> Float[Array, "T"]:
    """The same math in the dtype of its arguments, all logits at once."""
    logits = hidden @ weight.T
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    return _row_losses(logits, labels, options)


def _chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows a chunk: as few chunks as the limit allows, equally large, multiples of 8 for the tensor cores."""
    limit = max(8, CHUNK_BYTES // (4 * vocabulary) // 8 * 8)
    if rows <= limit:
        return max(1, rows)
    even = -(-rows // -(-rows // limit))
    return -(-even // 8) * 8


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] -> [chunks, chunk, ...], the last one filled up with zeros, whose results are dropped."""
    missing = -x.shape[0] % chunk
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _matmul(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contract one axis of each of two matrices of one dtype into float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)


def _chunk_logits(x: jax.Array, weight: jax.Array, options: Options) -> jax.Array:
    logits = _matmul(x, weight, (1, 1))
    return logits if options.soft_cap is None else options.soft_cap * jnp.tanh(logits / options.soft_cap)


def _row_losses(logits: jax.Array, labels: jax.Array, options: Options) -> jax.Array:
    vocabulary = logits.shape[1]
    lse = jax.nn.logsumexp(logits, axis=1)
    within = (labels >= 0) & (labels < vocabulary)
    at_label = jnp.take_along_axis(logits, jnp.where(within, labels, 0)[:, None], axis=1)[:, 0]
    loss = lse - (1 - options.label_smoothing) * at_label
    if options.label_smoothing:
        loss -= options.label_smoothing * jnp.mean(logits, axis=1)
    if options.z_loss:
        loss += options.z_loss * lse**2
    return jnp.where(labels == options.ignore_index, 0, jnp.where(within, loss, jnp.nan))


def _logit_gradients(logits: jax.Array, labels: jax.Array, options: Options) -> jax.Array:
    """ds [rows, V] in float32, for a cotangent of 1."""
    vocabulary = logits.shape[1]
    lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    at_label = jnp.arange(vocabulary)[None, :] == labels[:, None]
    ds = jnp.exp(logits - lse)
    if options.z_loss:
        ds *= 1 + 2 * options.z_loss * lse
    ds -= jnp.where(at_label, 1 - options.label_smoothing, 0) + options.label_smoothing / vocabulary
    if options.soft_cap is not None:
        ds *= 1 - (logits / options.soft_cap) ** 2
    within = (labels >= 0) & (labels < vocabulary)
    ds = jnp.where(within[:, None], ds, jnp.nan)
    return jnp.where((labels == options.ignore_index)[:, None], 0, ds)


def _xla(hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options) -> jax.Array:
    weight = weight.astype(hidden.dtype)

    def one_chunk(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = rows
        return _row_losses(_chunk_logits(x, weight, options), y, options)

    losses = jax.lax.map(one_chunk, _chunks(hidden, labels, options))
    return losses.reshape(-1)[: hidden.shape[0]]


def _chunks(hidden: jax.Array, labels: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    return _in_chunks(hidden, options.chunk), _in_chunks(labels, options.chunk)


def _loss_and_unit_dx(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The losses [T] and dx [T, H] for cotangents of 1."""
    weight = weight.astype(hidden.dtype)

    def one_chunk(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = rows
        logits = _chunk_logits(x, weight, options)
        ds = _logit_gradients(logits, y, options).astype(x.dtype)
        return _row_losses(logits, y, options), _matmul(ds, weight, (1, 0)).astype(x.dtype)

    losses, dx = jax.lax.map(one_chunk, _chunks(hidden, labels, options))
    return losses.reshape(-1)[: hidden.shape[0]], dx.reshape(-1, hidden.shape[1])[: hidden.shape[0]]


def _dx_and_dweight(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, g: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    # Cotangents as small as 1 / (number of tokens) would drown ds in float16: they are scaled to at most 1.
    largest = jnp.max(jnp.abs(g), initial=0)
    unit = jnp.where(largest == 0, 1, largest)
    used = weight.astype(hidden.dtype)

    def one_chunk(dweight: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, y, share = rows
        ds = _logit_gradients(_chunk_logits(x, used, options), y, options) * share[:, None]
        ds = ds.astype(x.dtype)
        dx = (_matmul(ds, used, (1, 0)) * unit).astype(x.dtype)
        return dweight + _matmul(ds, x, (0, 0)), dx

    rows = (*_chunks(hidden, labels, options), _in_chunks(g / unit, options.chunk))
    dweight, dx = jax.lax.scan(one_chunk, jax.lax.full_like(hidden, 0, jnp.float32, weight.shape), rows)
    return dx.reshape(-1, hidden.shape[1])[: hidden.shape[0]], (dweight * unit).astype(weight.dtype)


def _forward(hidden, weight, labels, options: Options) -> tuple[jax.Array, tuple]:
    """Each array arrives with the word whether it is differentiated."""
    arrays = (hidden.value, weight.value, labels.value)
    if weight.perturbed:
        return _xla(*arrays, options), arrays
    losses, unit_dx = _loss_and_unit_dx(*arrays, options)
    return losses, (unit_dx,)


def _backward(options: Options, saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None
    if len(saved) == 1:
        (unit_dx,) = saved
        return (unit_dx.astype(jnp.float32) * g[:, None]).astype(unit_dx.dtype), None, None
    hidden, weight, labels = saved
    return *_dx_and_dweight(hidden, weight, labels, g, options), None


_loss = jax.custom_vjp(_xla, nondiff_argnums=(3,))
_loss.defvjp(_forward, _backward, symbolic_zeros=True)
