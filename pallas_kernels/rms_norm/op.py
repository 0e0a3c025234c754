"""Root-mean-square norm over the last axis, with a hand-derived backward pass.

    r = (mean_i x_i^2 + eps)^(-1/2)          n_i = x_i r          y_i = w_i n_i

With cotangent g of y and h_i = g_i w_i, from dr/dx_j = -r^3 x_j / H:

    dx_j = r h_j - (r^3 x_j / H) sum_i h_i x_i = r (h_j - n_j mean_i(h_i n_i))
    dw_i = sum over rows of g_i n_i

Saved: x and w, which the caller holds anyway; r is made again from x. All of it is float32 arithmetic. Forward alone, n
is rounded to x's dtype before it meets w, as Hugging Face's Llama does: a bf16 model then gives the same bits up to the
order of the sum under the root.

Two functions without a derivative serve backward passes written by hand: they add the residual's gradient on the way,
and leave room at the end of each row for a matrix product's extra operands (see low_rank).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import check_floats, choose_implementation
from pallas_kernels.triton_call import triton_call, triton_obstacle


def rms_norm(
    x: Float[Array, "... H"], weight: Float[Array, "H"], eps: float, *, implementation: str | None = None
) -> Float[Array, "... H"]:
    """x / rms(x) * weight in x's dtype. The weight's gradient is a float32 sum, returned in the weight's dtype."""
    chosen = _choose(implementation)
    check_floats("rms_norm", x=x, weight=weight)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{x.shape=} must be [..., H], of at least one element a row.")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{weight.shape=} must be {x.shape[-1:]}, one weight per element of x's last axis.")
    return _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, chosen).reshape(x.shape)


def rms_norm_reference(x: Float[Array, "T H"], weight: Float[Array, "H"], eps: float) -> Float[Array, "T H"]:
    """The same math in the dtype of its arguments."""
    return weight[None] * (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps))


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 with the precision of `dtype`. A pair of casts would say the same, but XLA may cancel it."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def _normalise(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """n [T, H] and r [T, 1] in float32."""
    wide = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * r, r


def _xla(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    n, _ = _normalise(x, eps)
    return (_rounded(n, x.dtype) * _rounded(weight, x.dtype)[None]).astype(x.dtype)


def rms_norm_forward(
    x: Float[Array, "T H"], weight: Float[Array, "H"], eps: float, *, room: int = 0, implementation: str | None = None
) -> Float[Array, "T H+room"]:
    """`rms_norm` without a derivative, into rows with `room` more columns, which are left for others to fill."""
    if _choose(implementation) == "xla":
        return jnp.pad(_xla(x, weight, eps), ((0, 0), (0, room)))
    from pallas_kernels.rms_norm.triton_kernels import forward_kernel

    rows, width = x.shape
    return triton_call(
        forward_kernel,
        x,
        weight,
        out=jax.ShapeDtypeStruct((rows, width + room), x.dtype),
        grid=(rows,),
        num_warps=_warps(width),
        H=width,
        X_STRIDE=width,
        OUT_STRIDE=width + room,
        EPS=eps,
        BLOCK=_block(width),
    )


def rms_norm_backward(
    x: Float[Array, "T H"],
    weight: Float[Array, "H"],
    eps: float,
    g: Float[Array, "T G"],
    residual: Float[Array, "T R"] | None = None,
    *,
    room: int = 0,
    implementation: str | None = None,
) -> Float[Array, "T H+room"]:
    """dx + residual, the gradient that reached x past the norm, rounded once; into rows with `room` more columns.

    The first H columns of g and residual count.
    """
    if _choose(implementation) == "xla":
        rows, width = x.shape
        dx = _dx(x, weight, eps, g[:, :width])
        if residual is not None:
            dx = dx + residual[:, :width].astype(jnp.float32)
        return jnp.pad(dx.astype(x.dtype), ((0, 0), (0, room)))
    from pallas_kernels.rms_norm.triton_kernels import backward_kernel

    rows, width = x.shape
    return triton_call(
        backward_kernel,
        x,
        weight,
        g,
        x if residual is None else residual,
        out=jax.ShapeDtypeStruct((rows, width + room), x.dtype),
        grid=(rows,),
        num_warps=_warps(width),
        H=width,
        X_STRIDE=width,
        G_STRIDE=g.shape[1],
        RESIDUAL_STRIDE=0 if residual is None else residual.shape[1],
        OUT_STRIDE=width + room,
        EPS=eps,
        BLOCK=_block(width),
    )


def rms_norm_dweight(x: Float[Array, "T H"], eps: float, g: Float[Array, "T G"]) -> Float[Array, "H"]:
    """The weight's gradient, in float32."""
    n, _ = _normalise(x, eps)
    return jnp.sum(g[:, : x.shape[1]].astype(jnp.float32) * n, axis=0)


def _choose(implementation: str | None) -> str:
    return choose_implementation("rms_norm", implementation, {"triton": triton_obstacle(), "xla": None})


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _warps(width: int) -> int:
    """8 to 16 values a thread: enough loads in flight, few enough registers."""
    return min(16, max(1, _block(width) // 512))


def _dx(x: jax.Array, weight: jax.Array, eps: float, g: jax.Array) -> jax.Array:
    n, r = _normalise(x, eps)
    h = g.astype(jnp.float32) * _rounded(weight, x.dtype)[None]
    return r * (h - n * jnp.mean(h * n, axis=-1, keepdims=True))


def _primal(x: jax.Array, weight: jax.Array, eps: float, implementation: str) -> jax.Array:
    return rms_norm_forward(x, weight, eps, implementation=implementation)


def _forward(x: jax.Array, weight: jax.Array, eps: float, implementation: str) -> tuple[jax.Array, tuple]:
    return _primal(x, weight, eps, implementation), (x, weight)


def _backward(eps: float, implementation: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    dx = rms_norm_backward(x, weight, eps, g, implementation=implementation)
    return dx, rms_norm_dweight(x, eps, g).astype(weight.dtype)


_rms_norm = jax.custom_vjp(_primal, nondiff_argnums=(2, 3))
_rms_norm.defvjp(_forward, _backward)
