"""A linear's input and LoRA's low-rank product of it, z = u A, made together for a few rows; without derivatives.

For decoding, where each launch counts: every output of a linear needs all of z, so z must be there before it, but nothing
keeps it from being made with the linear's input. A comes transposed, with its scale in it, and for all layers
(pallas_kernels.nf4.LowRank), of which `layer` is taken where it lies; without A, z is None.

With `room`, a multiple of 64, u has so many columns more: z is there, and is not returned by itself. That is how a product
takes both at once (see wide.py).

z may be several summands one after the other, each of some of u's columns, [m, parts Z]; each meets the same B, which is
there as often. So as many programs share the work on a row, and none adds up what others made. In a room, which is
mostly empty, they cost nothing: there are as many as `summands` says, and zeros behind them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_implementation, exact_precision
from pallas_kernels.rms_norm import rms_norm_forward
from pallas_kernels.swiglu import swiglu_forward
from pallas_kernels.triton_call import triton_call, triton_obstacle

WARPS, BLOCK = 8, 4096
ROWS = 16  # with more, making the input anew for each number of z costs more than launches
MANY = 128  # with more, one product for all rows costs less than one for each
TOKENS, EACH = 4, 8  # rows, and numbers of z, that a program makes for over ROWS rows
PROGRAMS = 16  # that share a row out at least, where z has fewer numbers

Made = tuple[Float[Array, "m K+room"], Float[Array, "m Z"] | None]


def summands(room: int, count: int) -> int:
    """How many parts of z, of `count` numbers, lie in the room."""
    return max(1, room // count)


def slice_of(width: int, parts: int) -> int:
    """Columns of a summand, whole lines of a cache."""
    return -(-width // (64 * parts)) * 64


def norm_and_project(
    x: Float[Array, "m K"],
    weight: Float[Array, "L K"],
    eps: float,
    a: Float[Array, "L Z K"] | None,
    layer: Int[Array, ""],
    *,
    room: int = 0,
    implementation: str | None = None,
) -> Made:
    """(u, z): u = rms_norm(x)."""
    way = _choose("norm_and_project", x, a, room, implementation)
    if way == "xla":
        return _with_z(rms_norm_forward(x, weight[layer], eps), a, layer, room)
    if way == "rows" and a is not None:
        return _by_rows("norm", x, weight, a, layer, room, eps=eps)
    from pallas_kernels.low_rank.beside_kernels import norm_kernel

    (rows, width), count = x.shape, 0 if a is None else a.shape[1]
    programs = max(count, PROGRAMS)
    u, z = triton_call(
        norm_kernel,
        x,
        weight,
        x if a is None else a,
        layer[None],
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((rows, max(1, count)), x.dtype)),
        grid=(programs, rows),
        num_warps=WARPS,
        K=width,
        Z=count,
        SHARE=-(-width // programs),
        EPS=eps,
        BLOCK=1 << (width - 1).bit_length(),
    )
    return u, None if a is None else z


def swiglu_and_project(
    gate_up: Float[Array, "m 2K"],
    a: Float[Array, "L Z K"] | None,
    layer: Int[Array, ""],
    *,
    room: int = 0,
    parts: int = 1,
    implementation: str | None = None,
) -> Made:
    """(h, z): h = silu(gate) up."""
    way = _choose("swiglu_and_project", gate_up, a, room, implementation)
    if way == "xla":
        return _with_z(swiglu_forward(gate_up), a, layer, room, parts)
    if way == "rows" and a is not None:
        return _by_rows("swiglu", gate_up, gate_up, a, layer, room, parts)
    from pallas_kernels.low_rank.beside_kernels import swiglu_kernel

    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    count = 0 if a is None else a.shape[1]
    per, slice_ = max(count, PROGRAMS), slice_of(width, parts)
    h, z = triton_call(
        swiglu_kernel,
        gate_up,
        gate_up if a is None else a,
        layer[None],
        out=(
            jax.ShapeDtypeStruct((rows, width), gate_up.dtype),
            jax.ShapeDtypeStruct((rows, max(1, parts * count)), gate_up.dtype),
        ),
        grid=(per * parts, rows),
        num_warps=WARPS,
        K=width,
        Z=count,
        PARTS=parts,
        PER=per,
        SLICE=slice_,
        SHARE=-(-slice_ // per),
        BLOCK=_block(slice_),
    )
    return h, None if a is None else z


def project(
    x: Float[Array, "m K"],
    a: Float[Array, "L Z K"] | None,
    layer: Int[Array, ""],
    *,
    room: int = 0,
    parts: int = 1,
    implementation: str | None = None,
) -> Made:
    """(x, z) of an input that is there."""
    if a is None:
        return _with_z(x, a, layer, room)
    way = _choose("project", x, a, room, implementation)
    if way == "xla":
        return _with_z(x, a, layer, room, parts)
    if way == "rows":
        return _by_rows("same", x, x, a, layer, room, parts)
    from pallas_kernels.low_rank.beside_kernels import project_kernel

    (rows, width), count = x.shape, a.shape[1]
    slice_ = slice_of(width, parts)
    z = triton_call(
        project_kernel,
        x,
        a,
        layer[None],
        out=jax.ShapeDtypeStruct((rows, parts * count), x.dtype),
        grid=(count * parts, rows),
        num_warps=WARPS,
        K=width,
        Z=count,
        PARTS=parts,
        SLICE=slice_,
        BLOCK=_block(slice_),
    )
    return x, z


def _by_rows(
    kind: str,
    x: jax.Array,
    weight: jax.Array,
    a: Float[Array, "L Z K"],
    layer: jax.Array,
    room: int,
    parts: int = 1,
    eps: float = 0.0,
) -> Made:
    from pallas_kernels.low_rank.beside_kernels import rows_kernel

    rows, (_, count, width) = x.shape[0], a.shape
    tiles, parts = -(-count // EACH), summands(room, count) if room else parts
    slice_ = slice_of(width, parts)
    kept = kind != "same" or room > 0  # else u is x
    u, z = triton_call(
        rows_kernel,
        x,
        weight,
        a,
        layer[None],
        out=(
            jax.ShapeDtypeStruct((rows, width + room) if kept else (1, 1), x.dtype),
            jax.ShapeDtypeStruct((1, 1) if room else (rows, parts * count), x.dtype),
        ),
        grid=(tiles * parts, -(-rows // TOKENS)),
        num_warps=WARPS,
        KIND=kind,
        M=rows,
        K=width,
        Z=count,
        ROOM=room,
        PARTS=parts,
        SLICE=slice_,
        SHARE=-(-slice_ // (64 * tiles)) * 64,
        EPS=eps,
        TOKENS=TOKENS,
        EACH=EACH,
        BLOCK=min(1024, _block(slice_)),
    )
    return u if kept else x, None if room else z


def _with_z(u: jax.Array, a: jax.Array | None, layer: jax.Array, room: int, parts: int = 1) -> Made:
    """z whole, as the first of its summands."""
    z = None
    if a is not None:
        factor = a[layer].astype(u.dtype)
        z = jnp.einsum("mk,zk->mz", u, factor, precision=exact_precision(u.dtype), preferred_element_type=jnp.float32)
        z = z.astype(u.dtype)
    if not room:
        return u, z if z is None else jnp.pad(z, ((0, 0), (0, (parts - 1) * z.shape[1])))
    u = jnp.pad(u, ((0, 0), (0, room)))
    return u if z is None else jax.lax.dynamic_update_slice(u, z, (0, u.shape[1] - room)), None


def _block(width: int) -> int:
    return min(BLOCK, 1 << (width - 1).bit_length())


def _choose(op: str, x: jax.Array, a: jax.Array | None, room: int, implementation: str | None) -> str:
    """ "triton" for a few rows, "rows" for more, or "xla"."""
    obstacle = triton_obstacle()
    by_rows = x.shape[0] > ROWS or room > 0
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"it takes bfloat16 or float16, not {x.dtype}"
    elif x.shape[0] > MANY:
        obstacle = f"it takes up to {MANY} rows, and {x.shape=} has {x.shape[0]}"
    elif by_rows and a is None:
        obstacle = f"without a low-rank product it takes up to {ROWS} rows and no room, not {x.shape=} and {room=}"
    chosen = choose_implementation(op, implementation, {"triton": obstacle, "xla": None})
    return "rows" if chosen == "triton" and by_rows else chosen
