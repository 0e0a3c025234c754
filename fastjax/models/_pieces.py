import jax
import jax.numpy as jnp

from pallas_kernels import apply_rope, flash_attention, rms_norm, swiglu
from pallas_kernels.dispatch import exact_precision


def _dot(x, y, cx, cy, out=None):
    return jax.lax.dot_general(
        x, y, (((cx,), (cy,)), ((), ())), precision=exact_precision(x.dtype), preferred_element_type=jnp.float32
    ).astype(out or x.dtype)


def matmul_nt(x, w, *, z=None, b=None, residual=None):
    y = _dot(x, w, 1, 1, jnp.float32)
    if z is not None:
        y = y + _dot(z, b, 1, 0, jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(x.dtype)


def matmul_nn(g, w, *, dz=None, a=None, residual=None):
    y = _dot(g, w, 1, 0, jnp.float32)
    if dz is not None:
        y = y + _dot(dz, a, 1, 1, jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(g.dtype)


def low_rank_project(x, a, s):
    return (_dot(x, a, 1, 0, jnp.float32) * s[None]).astype(x.dtype)


def low_rank_gradients(z, g, b, scales, ranks, widths):
    dz = (_dot(g, b, 1, 1, jnp.float32) * scales[None]).astype(g.dtype)
    dbs = []
    r0 = 0
    n0 = 0
    for r, n in zip(ranks, widths, strict=False):
        if r:
            dbs.append(_dot(z[:, r0 : r0 + r], g[:, n0 : n0 + n], 0, 0, jnp.float32))
        r0 += r
        n0 += n
    return dz, dbs


def rms_norm_forward(x, w, eps):
    return rms_norm(x, w, eps)


def rms_norm_backward(x, w, eps, g, residual_gradient, want_dweight):
    _, f = jax.vjp(lambda x, w: rms_norm(x, w, eps), x, w)
    dx, dw = f(g)
    dx = dx + residual_gradient
    return (dx, dw.astype(jnp.float32)) if want_dweight else dx


def rope_qk(qkv, cos, sin, nq, nkv):
    B, S, h = cos.shape
    D = 2 * h
    x = qkv.reshape(B, S, -1, D)
    return apply_rope(x[:, :, :nq], cos, sin), apply_rope(x[:, :, nq : nq + nkv], cos, sin), x[:, :, nq + nkv :]


def rope_qk_backward(dq, dk, dv, cos, sin):
    d = jnp.concatenate([apply_rope(dq, cos, -sin), apply_rope(dk, cos, -sin), dv], axis=2)
    return d.reshape(d.shape[0] * d.shape[1], -1)


def swiglu_forward(gu):
    m = gu.shape[1] // 2
    return swiglu(gu[:, :m], gu[:, m:])


def swiglu_backward(gu, dh):
    m = gu.shape[1] // 2
    h, f = jax.vjp(swiglu, gu[:, :m], gu[:, m:])
    return jnp.concatenate(f(dh), axis=1), h


def attention_forward(q, k, v, *, causal, segment_ids):
    return jax.vjp(lambda q, k, v: flash_attention(q, k, v, causal=causal, segment_ids=segment_ids), q, k, v)


def attention_backward(q, k, v, o, saved, do, *, causal, segment_ids):
    return saved(do)
