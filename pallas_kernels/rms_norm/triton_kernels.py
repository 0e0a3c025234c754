"""Triton kernels of the norm: a program a row, which it reads once. Rows may lie further apart than they are long."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x,
    weight,
    out,
    H: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    wide = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + EPS)
    dtype = x.dtype.element_ty
    w = tl.load(weight + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    tl.store(out + row * OUT_STRIDE + column, ((wide * r).to(dtype).to(tl.float32) * w).to(dtype), mask=inside)


@triton.jit
def backward_kernel(
    x,
    weight,
    g,
    residual,
    out,
    H: tl.constexpr,
    X_STRIDE: tl.constexpr,
    G_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx + residual; no residual is read where RESIDUAL_STRIDE is 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    dtype = x.dtype.element_ty
    wide = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    h = tl.load(g + row * G_STRIDE + column, mask=inside, other=0.0).to(tl.float32) * w
    r = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + EPS)
    n = wide * r
    dx = r * (h - n * (tl.sum(h * n, axis=0) / H))
    if RESIDUAL_STRIDE > 0:
        dx += tl.load(residual + row * RESIDUAL_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * OUT_STRIDE + column, dx.to(dtype), mask=inside)


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype in ("*bf16", "*fp16", "*fp32"):
        strides = {"H": 4096, "X_STRIDE": 4096, "OUT_STRIDE": 4160, "EPS": 1e-5, "BLOCK": 4096}
        yield forward_kernel, {"x": dtype, "weight": dtype, "out": dtype}, strides, {"num_warps": 8}
        strides |= {"G_STRIDE": 4096, "RESIDUAL_STRIDE": 4160}
        arrays = {"x": dtype, "weight": dtype, "g": dtype, "residual": dtype, "out": dtype}
        yield backward_kernel, arrays, strides, {"num_warps": 8}
