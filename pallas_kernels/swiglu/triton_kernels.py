"""Triton kernels of the gated activation, over rows that hold gate and then up."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    gate_up, out, M: tl.constexpr, IN_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    gate = tl.load(gate_up + row * IN_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * IN_STRIDE + M + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * OUT_STRIDE + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gate_up,
    g,
    d_gate_up,
    out,
    M: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    G_STRIDE: tl.constexpr,
    D_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients, and y made again on the way; out may be g, as each value is read before its place is written."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * IN_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * IN_STRIDE + M + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(g + row * G_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    gated = gate * s
    d_gate = dy * up * s * (1 + gate * (1 - s))
    tl.store(d_gate_up + row * D_STRIDE + column, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up + row * D_STRIDE + M + column, (dy * gated).to(dtype), mask=inside)
    tl.store(out + row * M + column, (gated * up).to(dtype), mask=inside)


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype in ("*bf16", "*fp16", "*fp32"):
        sizes = {"M": 14336, "IN_STRIDE": 28672, "BLOCK": 1024}
        yield forward_kernel, {"gate_up": dtype, "out": dtype}, sizes | {"OUT_STRIDE": 14400}, {"num_warps": 4}
        arrays = {"gate_up": dtype, "g": dtype, "d_gate_up": dtype, "out": dtype}
        yield backward_kernel, arrays, sizes | {"G_STRIDE": 14336, "D_STRIDE": 28736}, {"num_warps": 4}
