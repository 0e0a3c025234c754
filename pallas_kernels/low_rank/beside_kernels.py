"""Triton kernels that make a linear's input and LoRA's low-rank product of it in one launch, for a few rows.

A program makes one number of z, for which it makes all of the input anew, from what a cache holds; of the input it stores
its share. So no program waits for another. With more rows there are programs enough without that, and what each makes anew
counts: a program of `rows_kernel` makes several numbers of z.
"""

import triton
import triton.language as tl


@triton.jit
def _store_share(y, out, column, row, r, K: tl.constexpr, SHARE: tl.constexpr):
    mine = (column >= r * SHARE) & (column < (r + 1) * SHARE) & (column < K)
    tl.store(out + row * K + column, y.to(out.dtype.element_ty), mask=mine)


@triton.jit
def norm_kernel(
    x,
    weight,
    a,
    layers,
    u,
    z,
    K: tl.constexpr,
    Z: tl.constexpr,
    SHARE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u = rms_norm(x) and z = u a^T of one layer: weight [L, K], a [L, Z, K]."""
    r, row = tl.program_id(0), tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    dtype: tl.constexpr = x.dtype.element_ty
    v = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + layer * K + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, axis=0) / K + EPS)
    y = (v.to(dtype).to(tl.float32) * w).to(dtype)
    _store_share(y, u, column, row, r, K, SHARE)
    if r < Z:
        factor = tl.load(a + (layer * Z + r) * K + column, mask=inside, other=0.0)
        tl.store(z + row * Z + r, tl.sum(y.to(tl.float32) * factor.to(tl.float32), axis=0).to(dtype))


@triton.jit
def swiglu_kernel(gate_up, a, layers, h, z, K: tl.constexpr, Z: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """h = silu(gate) up and z = h a^T of one layer: gate_up [m, 2 K], a [L, Z, K]."""
    r, row = tl.program_id(0), tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        gate = tl.load(gate_up + row * 2 * K + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * K + K + column, mask=inside, other=0.0).to(tl.float32)
        y = (gate * tl.sigmoid(gate) * up).to(dtype)
        _store_share(y, h, column, row, r, K, SHARE)
        if r < Z:
            factor = tl.load(a + (layer * Z + r) * K + column, mask=inside, other=0.0)
            total += y.to(tl.float32) * factor.to(tl.float32)
    if r < Z:
        tl.store(z + row * Z + r, tl.sum(total, axis=0).to(dtype))


@triton.jit
def project_kernel(x, a, layers, z, K: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr):
    """z = x a^T of one layer: a [L, Z, K]."""
    r, row = tl.program_id(0), tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
        factor = tl.load(a + (layer * Z + r) * K + column, mask=column < K, other=0.0)
        total += y * factor.to(tl.float32)
    tl.store(z + row * Z + r, tl.sum(total, axis=0).to(z.dtype.element_ty))


@triton.jit
def rows_kernel(
    x,
    weight,
    a,
    layers,
    u,
    z,
    KIND: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    ROOM: tl.constexpr,
    SHARE: tl.constexpr,
    EPS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """u [m, K + ROOM] by the KIND ("norm", "swiglu" or "same") and EACH columns of z = u a^T, which go into u's room if it has
    one, and zeros after them."""
    part, row = tl.program_id(0), tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    r = part * EACH + tl.arange(0, EACH)
    if KIND == "norm":
        every = tl.arange(0, WHOLE)
        v = tl.load(x + row * K + every, mask=every < K, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(v * v, axis=0) / K + EPS)
    total = tl.zeros((EACH, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        if KIND == "swiglu":
            gate = tl.load(x + row * 2 * K + column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(x + row * 2 * K + K + column, mask=inside, other=0.0).to(tl.float32)
            y = (gate * tl.sigmoid(gate) * up).to(dtype)
        else:
            y = tl.load(x + row * K + column, mask=inside, other=0.0)
        if KIND == "norm":
            w = tl.load(weight + layer * K + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
            y = ((y.to(tl.float32) * inverse).to(dtype).to(tl.float32) * w).to(dtype)
        mine = (column >= part * SHARE) & (column < (part + 1) * SHARE) & inside
        if KIND != "same" or ROOM > 0:
            tl.store(u + row * (K + ROOM) + column, y, mask=mine)
        there = (r < Z)[:, None] & inside[None, :]
        factor = tl.load(a + (layer * Z + r)[:, None] * K + column[None, :], mask=there, other=0.0)
        total += y.to(tl.float32)[None, :] * factor.to(tl.float32)
    sums = tl.sum(total, axis=1).to(dtype)
    if ROOM > 0:
        tl.store(u + row * (K + ROOM) + K + r, sums, mask=r < Z)
        if part == 0:
            for first in range(0, ROOM, 64):
                rest = first + tl.arange(0, 64)
                tl.store(u + row * (K + ROOM) + K + rest, tl.zeros((64,), dtype), mask=rest >= Z)
    else:
        tl.store(z + row * Z + r, sums, mask=r < Z)


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype in ("*bf16",):
        arrays = dict.fromkeys(("x", "weight", "a", "u", "z", "gate_up", "h"), dtype) | {"layers": "*i32"}
        sizes = {"K": 4096, "Z": 48, "SHARE": 86, "BLOCK": 4096}
        yield norm_kernel, _of(norm_kernel, arrays), sizes | {"EPS": 1e-5}, {"num_warps": 8}
        sizes = {"K": 14336, "Z": 16, "SHARE": 896, "BLOCK": 4096}
        yield swiglu_kernel, _of(swiglu_kernel, arrays), sizes, {"num_warps": 8}
        yield project_kernel, _of(project_kernel, arrays), {"K": 4096, "Z": 16, "BLOCK": 4096}, {"num_warps": 8}
        sizes = {"K": 4096, "Z": 48, "SHARE": 704, "EPS": 1e-5, "EACH": 8, "BLOCK": 2048, "WHOLE": 4096}
        for kind, room in (("norm", 64), ("swiglu", 0)):
            rest = {"KIND": kind, "ROOM": room}
            yield rows_kernel, _of(rows_kernel, arrays), sizes | rest, {"num_warps": 8}


def _of(kernel, arrays: dict[str, str]) -> dict[str, str]:
    return {name: dtype for name, dtype in arrays.items() if name in kernel.arg_names}
