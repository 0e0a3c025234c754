"""Attention of new positions to all that a key/value cache holds, each row of the batch as long as it is.

Query t of row b stands at position p = lengths[b] + t, and its own key is in the cache already. It sees the keys at
positions 0 to p, or the last `sliding_window` of them:

    o_bt = sum_s softmax_s(scale q_bt . k_bs) v_bs        over the s it sees

The G = N / K query heads of a key head are multiplied together, so that a key is read once for all of them. Products are
accumulated in float32, where the softmax is computed; its weights are rounded to q's dtype, as in flash_attention.

Keys and values may be stored in 8 bits with a scale each (see stack.py): codes are then multiplied as such, in q's dtype
or, by the kernel, in float16, which hold them exactly, and the scales join the logits and the weights.

Few rows would leave most of a GPU idle, so the kernel cuts a row's positions into P pieces, each a softmax of its own:

    o = sum_p w_p o_p        w = softmax_p(lse_p)

It reads what rows hold and no more, where XLA reads the whole capacity, twice.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.stack import storage_obstacle
from pallas_kernels.decode_attention.work import LARGEST, Work, padded
from pallas_kernels.dispatch import check_floats, choose_implementation, exact_precision
from pallas_kernels.flash_attention.options import check_window
from pallas_kernels.triton_call import triton_call, triton_obstacle
from pallas_kernels.tuning import choice

LEAST_SPAN = 128  # fewer positions in a piece are not worth a program
FULL = 0.9  # of what a GPU can run at once, that programs should fill
PART = 256  # new positions that XLA takes at a time: each has a logit for all that the cache could hold
LINES = 128  # the most queries of a key head that a program holds
LANE_LINES = 8  # the most that a program of one warp holds
LANE_SPAN = 64  # as LEAST_SPAN, of such programs


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Positions of a step, warps and stages of a program, and how many programs the GPU runs at once."""

    positions: int
    warps: int
    stages: int
    programs: int

    def __post_init__(self) -> None:
        if self.positions not in (16, 32, 64, 128, 256) or self.warps not in (1, 2, 4, 8):
            raise ValueError(f"{self}: positions must be 16, 32, 64, 128 or 256, warps 1, 2, 4 or 8.")
        if not 1 <= self.stages <= 8 or self.programs < 1:
            raise ValueError(f"{self}: stages must be 1 to 8, and programs 1 at least.")


def default_tiles(dtype: Any, depth: int, lines: int) -> Tiles:
    """For keys stored like this. Codes are worth longer steps, as what a step costs but for its products stays the same;
    their programs take more registers, and a large GPU's multiprocessor runs three instead of four.
    """
    if jnp.dtype(dtype) not in LARGEST:
        return Tiles(positions=64, warps=4, stages=2, programs=528)
    return Tiles(positions=128 if depth <= 128 and lines <= 32 else 64, warps=4, stages=2, programs=396)


def tuned(dtype: Any, depth: int, lines: int) -> Tiles:
    """By how keys are stored, their numbers, and the queries of a key head, both padded as the kernel pads them."""
    stored = jnp.dtype(dtype).name if jnp.dtype(dtype) in LARGEST else "16 bits"
    return choice("decode_attention.tiles", default_tiles(dtype, depth, lines), stored=stored, depth=depth, lines=lines)


LANE_TILES = Tiles(32, warps=1, stages=1, programs=1584)


def by_lanes(stored: Any, depth: int, lines: int) -> bool:
    """Whether programs are of one warp each (lane_kernels.py), for keys that are stored like this."""
    return jnp.dtype(stored) in LARGEST and depth in (64, 128) and lines <= LANE_LINES


def tuned_lanes(dtype: Any, depth: int) -> Tiles:
    stored = jnp.dtype(dtype).name
    return choice("decode_attention.lanes", LANE_TILES, stored=stored, depth=depth)


def decode_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "*L B K C D"],
    v: Float[Array, "*L B K C D"],
    lengths: Int[Array, "B"],
    *,
    k_scales: Float[Array, "*L B K C"] | None = None,
    v_scales: Float[Array, "*L B K C"] | None = None,
    layer: Int[Array, ""] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """The attention of `q` to a cache of capacity C; `lengths` are the positions that each row held before these.

    Args:
        k_scales, v_scales: of a cache in int8 or float8_e4m3fn, the scale of each position and head.
        layer: which layer of a stack the cache is, where k and v hold several; it is not cut out.
        scale: of the logits, 1 / sqrt(D) by default.
        sliding_window: how many positions a query sees, its own counted; None for all.
        implementation: "triton" (few new positions, 16-bit queries) or "xla".
    """
    if layer is None:
        k, v = k[None], v[None]
        k_scales, v_scales = (None if each is None else each[None] for each in (k_scales, v_scales))
    index = jnp.int32(0) if layer is None else layer
    _check(q, k, v, lengths, k_scales, v_scales)
    chosen = choose_implementation("decode_attention", implementation, {"triton": _obstacle(q, k), "xla": None})
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if not math.isfinite(factor):
        raise ValueError(f"{scale=} must be finite.")
    if sliding_window is not None:
        check_window(sliding_window)
    if chosen == "triton":
        parts, lse = in_pieces(q, k, v, lengths, k_scales, v_scales, index, factor, sliding_window)
        return merged(parts, lse, q.dtype)
    of_k, of_v = (None if each is None else each[index] for each in (k_scales, v_scales))
    return _in_parts(q, k[index], v[index], lengths, of_k, of_v, factor, sliding_window)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
) -> None:
    check_floats("decode_attention", q=q)
    batch, _, heads, dim = q.shape
    if (
        k.shape != v.shape
        or not q.size
        or not k.size
        or k.ndim != 5
        or (k.shape[1], k.shape[4]) != (batch, dim)
        or heads % k.shape[2]
    ):
        raise ValueError(
            f"decode_attention needs q [B, T, N, D] and k, v [B, K, C, D] with K dividing N, but {q.shape=}, "
            f"k.shape={k.shape[1:]}, v.shape={v.shape[1:]}."
        )
    if lengths.shape != (batch,):
        raise ValueError(f"decode_attention needs one length a row, [{batch}], but {lengths.shape=}.")
    for name, each in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (each is not None) != (k.dtype in LARGEST) or (each is not None and each.shape != k.shape[:-1]):
            shape = None if each is None else each.shape[1:]
            raise ValueError(
                f"decode_attention needs {name} [B, K, C] for a cache of {', '.join(map(str, LARGEST))}, and for no other,"
                f" but k is {k.dtype} and {name} has shape {shape}."
            )


def _obstacle(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernel cannot serve this call, None where it can."""
    lines = q.shape[1] * q.shape[2] // k.shape[2]
    if lines > LINES:
        return f"it takes at most {LINES} queries of a key head, new positions times heads, not {lines}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q.dtype}"
    return triton_obstacle() or storage_obstacle(k.dtype)


def _in_parts(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *rest: Any) -> Float[Array, "B T N D"]:
    """`_reference`, of some new positions after the other."""
    batch, new, heads, dim = q.shape
    if new <= PART or new % PART:
        return _reference(q, k, v, lengths, *rest)
    parts = q.reshape(batch, -1, PART, heads, dim).swapaxes(0, 1)
    starts = jnp.arange(0, new, PART, dtype=lengths.dtype)
    out = jax.lax.map(lambda part: _reference(part[0], k, v, lengths + part[1], *rest), (parts, starts))
    return out.swapaxes(0, 1).reshape(q.shape)


def _reference(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    lengths: Int[Array, "B"],
    k_scales: Float[Array, "B K C"] | None,
    v_scales: Float[Array, "B K C"] | None,
    factor: float,
    window: int | None,
) -> Float[Array, "B T N D"]:
    batch, new, heads, dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = q.reshape(batch, new, kv_heads, group, dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    logits = _product("bkrd,bkcd->bkrc", rows, k.astype(q.dtype)) * factor
    if k_scales is not None:
        logits *= k_scales[:, :, None]
    position = lengths[:, None, None] + (jnp.arange(new * group, dtype=lengths.dtype) // group)[None, :, None]
    place = jnp.arange(capacity, dtype=lengths.dtype)[None, None, :]
    seen = place <= position
    if window is not None:
        seen &= place > position - window
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    # what a cache holds past a row's end may be anything; a weight of 0 would not undo a NaN
    written = (place <= position[:, -1:])[:, 0, None, :]
    values = jnp.where(written[..., None], v.astype(q.dtype), jnp.zeros((), q.dtype))
    if v_scales is not None:
        weights *= jnp.where(written, v_scales, 0.0)[:, :, None]
    out = _product("bkrc,bkcd->bkrd", weights.astype(q.dtype), values).reshape(batch, kv_heads, new, group, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def in_pieces(
    q: Float[Array, "B T N D"],
    k: Float[Array, "L B K C D"],
    v: Float[Array, "L B K C D"],
    lengths: Int[Array, "B"],
    k_scales: Float[Array, "L B K C"] | None,
    v_scales: Float[Array, "L B K C"] | None,
    layer: Int[Array, ""],
    scale: float,
    window: int | None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "P B T N D"], Float[Array, "P B T N"]]:
    """The parts of the output, in q's dtype if there is but one, and the log-sum-exp of each: the kernel's two results."""
    from pallas_kernels.decode_attention.lane_kernels import lanes_kernel
    from pallas_kernels.decode_attention.triton_kernels import decode_kernel

    lines = q.shape[1] * q.shape[2] // k.shape[2]
    if by_lanes(k.dtype, q.shape[3], lines):
        kernel, tiles = lanes_kernel, tiles or tuned_lanes(k.dtype, q.shape[3])
    else:
        kernel, tiles = decode_kernel, tiles or tuned(k.dtype, padded(q.shape[3]), max(16, padded(lines)))
    span = LANE_SPAN if tiles.warps == 1 else LEAST_SPAN
    work = work_of(q.shape, k.shape[1:], jnp.dtype(k.dtype).name, scale, window, tiles, span)
    return triton_call(
        kernel,
        q,
        k,
        v,
        lengths if k_scales is None else k_scales,
        lengths if v_scales is None else v_scales,
        lengths,
        layer[None],
        out=(
            jax.ShapeDtypeStruct((work.pieces, *q.shape), q.dtype if work.pieces == 1 else jnp.float32),
            jax.ShapeDtypeStruct((work.pieces, *q.shape[:3]), jnp.float32),
        ),
        grid=(q.shape[0] * k.shape[2], work.pieces),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        W=work,
    )


def merged(parts: Float[Array, "P B T N D"], lse: Float[Array, "P B T N"], dtype: jnp.dtype) -> Float[Array, "B T N D"]:
    """The output, of its parts: a launch where XLA would take several, and none for one part."""
    from pallas_kernels.decode_attention.triton_kernels import merge_kernel

    pieces, *shape, dim = parts.shape
    if pieces == 1:
        return parts[0].astype(dtype)
    (out,) = triton_call(
        merge_kernel,
        parts,
        lse,
        out=(jax.ShapeDtypeStruct((*shape, dim), dtype),),
        grid=(math.prod(shape),),
        num_warps=4 if pieces <= 32 else 8,
        P=pieces,
        PP=padded(pieces),
        LINES=math.prod(shape),
        D=dim,
        DP=padded(dim),
    )
    return out


def work_of(
    q: tuple[int, ...], k: tuple[int, ...], stored: str, scale: float, window: int | None, tiles: Tiles, span: int
) -> Work:
    """For q [B, T, N, D] and k [B, K, C, D], in pieces of at least `span` positions."""
    batch, new, heads, depth = q
    _, kv_heads, capacity, _ = k
    longest = capacity if window is None else min(capacity, window + new + tiles.positions)
    return Work(
        batch=batch,
        new=new,
        heads=heads,
        kv_heads=kv_heads,
        capacity=capacity,
        depth=depth,
        stored=stored,
        factor=scale * math.log2(math.e),
        window=window or 0,
        positions=tiles.positions,
        pieces=pieces_of(batch * kv_heads, -(-longest // span), tiles.programs),
        span=span,
    )


def pieces_of(rows: int, most: int, programs: int) -> int:
    """Into how many pieces to cut each of so many heads' rows: so that rounds of as many programs as run at once are full,
    or nearly.
    """

    def filled(pieces: int) -> float:
        return rows * pieces / (-(-rows * pieces // programs) * programs)

    counts = range(1, max(1, min(most, 4 * programs // rows)) + 1)
    return next((count for count in counts if filled(count) >= FULL), max(counts, key=filled))


def _product(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In float32."""
    return jnp.einsum(pattern, x, y, precision=exact_precision(x.dtype), preferred_element_type=jnp.float32)
