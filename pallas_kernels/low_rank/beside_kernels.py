"""Triton kernels that make a linear's input and LoRA's low-rank product of it in one launch, for a few rows.

A program makes one number of z, for which it makes the input anew, from what a cache holds; of the input it stores its
share. So no program waits for another. Where z may be several summands, a program makes one of those from a slice of the
columns. With more rows there are programs enough, and what each reads anew counts: a program of `rows_kernel` makes several
numbers of z for several rows.
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
def swiglu_kernel(
    gate_up,
    a,
    layers,
    h,
    z,
    K: tl.constexpr,
    Z: tl.constexpr,
    PARTS: tl.constexpr,
    PER: tl.constexpr,
    SLICE: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = silu(gate) up, and z = h a^T of one layer in PARTS summands, each by PER programs: gate_up [m, 2 K], a [L, Z, K]."""
    part, r, row = tl.program_id(0) // PER, tl.program_id(0) % PER, tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(part * SLICE + SLICE, K)
    for start in range(0, SLICE, BLOCK):
        column = part * SLICE + start + tl.arange(0, BLOCK)
        inside = column < last
        gate = tl.load(gate_up + row * 2 * K + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * K + K + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(a + (layer * Z + r) * K + column, mask=column < tl.where(r < Z, last, 0), other=0.0)
        y = (gate * tl.sigmoid(gate) * up).to(dtype)
        mine = part * SLICE + r * SHARE
        own = (column >= mine) & (column < tl.minimum(mine + SHARE, last))
        tl.store(h + row * K + column, y, mask=own)
        total += y.to(tl.float32) * factor.to(tl.float32)
    if r < Z:
        tl.store(z + (row * PARTS + part) * Z + r, tl.sum(total, axis=0).to(dtype))


@triton.jit
def project_kernel(
    x,
    a,
    layers,
    z,
    K: tl.constexpr,
    Z: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = x a^T of one layer in PARTS summands: a [L, Z, K]."""
    part, r, row = tl.program_id(0) // Z, tl.program_id(0) % Z, tl.program_id(1)
    layer = tl.load(layers).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SLICE, BLOCK):
        column = part * SLICE + start + tl.arange(0, BLOCK)
        inside = column < tl.minimum(part * SLICE + SLICE, K)
        y = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(a + (layer * Z + r) * K + column, mask=inside, other=0.0)
        total += y * factor.to(tl.float32)
    tl.store(z + (row * PARTS + part) * Z + r, tl.sum(total, axis=0).to(z.dtype.element_ty))


@triton.jit
def _made(x, weight, row, column, inverse, KIND: tl.constexpr, K: tl.constexpr):
    """Some columns of a row of u; weight is the layer's."""
    dtype: tl.constexpr = x.dtype.element_ty
    inside = column < K
    if KIND == "swiglu":
        gate = tl.load(x + row * 2 * K + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * K + K + column, mask=inside, other=0.0).to(tl.float32)
        y = (gate * tl.sigmoid(gate) * up).to(dtype)
    else:
        y = tl.load(x + row * K + column, mask=inside, other=0.0)
    if KIND == "norm":
        w = tl.load(weight + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
        y = ((y.to(tl.float32) * inverse).to(dtype).to(tl.float32) * w).to(dtype)
    return y


@triton.jit
def _summed(parts, BLOCK: tl.constexpr):
    """The sums of 32 tensors of BLOCK numbers, in one go."""
    for level in tl.static_range(5):
        joined = ()
        for i in tl.static_range(16 >> level):
            joined += (tl.join(parts[i], parts[i + (16 >> level)]),)
        parts = joined
    return tl.sum(tl.reshape(parts[0], (BLOCK, 32)), axis=0)


@triton.jit
def rows_kernel(
    x,
    weight,
    a,
    layers,
    u,
    z,
    KIND: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    SHARE: tl.constexpr,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u [m, K + ROOM] by the KIND ("norm", "swiglu" or "same"), and z = u a^T, which goes into u's room if it has one.

    A program has TOKENS rows, EACH numbers of z and one of PARTS slices of the columns: of z it makes a summand, and PARTS
    summands lie side by side, in the room with zeros behind them.
    """
    which, tile = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (Z + EACH - 1) // EACH
    part, first = which // TILES, which % TILES * EACH
    layer = tl.load(layers).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    if KIND == "norm":
        weight += layer * K
    begin, mine = part * SLICE, part * SLICE + which % TILES * SHARE
    inverse, total = (), ()
    for i in tl.static_range(TOKENS):
        row = tl.minimum(tile * TOKENS + i, M - 1)
        scale = 1.0
        if KIND == "norm":
            squares = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, K, BLOCK):
                column = start + tl.arange(0, BLOCK)
                v = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
                squares += v * v
            scale = tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
        inverse += (scale,)
        total += (tl.zeros((BLOCK,), tl.float32),) * EACH
    for step in range((SLICE + BLOCK - 1) // BLOCK):
        column = begin + step * BLOCK + tl.arange(0, BLOCK)
        end = tl.minimum(begin + SLICE, K)
        ys, sums = (), ()
        for i in tl.static_range(TOKENS):
            row = tile * TOKENS + i
            y = _made(x, weight, tl.minimum(row, M - 1), column, inverse[i], KIND, K)
            if KIND != "same" or ROOM > 0:
                last = tl.where(row < M, tl.minimum(mine + SHARE, end), 0)
                tl.store(u + row * (K + ROOM) + column, y, mask=(column >= mine) & (column < last))
            ys += (y.to(tl.float32),)
        for r in tl.static_range(EACH):
            last = tl.where(first + r < Z, end, 0)
            factor = tl.load(a + (layer * Z + first + r) * K + column, mask=column < last, other=0.0)
            for i in tl.static_range(TOKENS):
                sums += (total[r * TOKENS + i] + ys[i] * factor.to(tl.float32),)
        total = sums
    index = tl.arange(0, TOKENS * EACH)
    row, r = tile * TOKENS + index % TOKENS, first + index // TOKENS
    tl.static_assert(TOKENS * EACH == 32)
    made, real = _summed(total, BLOCK).to(dtype), (row < M) & (r < Z)
    if ROOM > 0:
        tl.store(u + row * (K + ROOM) + K + part * Z + r, made, mask=real)
        if which == 0:
            rest = PARTS * Z + tl.arange(0, 64)
            for i in tl.static_range(TOKENS):
                for first_column in range(0, ROOM - PARTS * Z, 64):
                    column = first_column + rest
                    last = tl.where(tile * TOKENS + i < M, ROOM, 0)
                    place = u + (tile * TOKENS + i) * (K + ROOM) + K + column
                    tl.store(place, tl.zeros((64,), dtype), mask=column < last)
    else:
        tl.store(z + (row * PARTS + part) * Z + r, made, mask=real)


def compile_cases():
    """What tests compile for every supported architecture."""
    for dtype in ("*bf16",):
        arrays = dict.fromkeys(("x", "weight", "a", "u", "z", "gate_up", "h"), dtype) | {"layers": "*i32"}
        sizes = {"K": 4096, "Z": 48, "SHARE": 86, "BLOCK": 4096}
        yield norm_kernel, _of(norm_kernel, arrays), sizes | {"EPS": 1e-5}, {"num_warps": 8}
        sizes = {"K": 14336, "Z": 16, "PARTS": 4, "PER": 16, "SLICE": 3584, "SHARE": 224, "BLOCK": 4096}
        yield swiglu_kernel, _of(swiglu_kernel, arrays), sizes, {"num_warps": 8}
        sizes = {"K": 4096, "Z": 16, "PARTS": 4, "SLICE": 1024, "BLOCK": 1024}
        yield project_kernel, _of(project_kernel, arrays), sizes, {"num_warps": 8}
        sizes = {"M": 64, "K": 4096, "SHARE": 704, "EPS": 1e-5, "TOKENS": 4, "EACH": 8, "BLOCK": 1024}
        for kind, rest in (
            ("norm", {"Z": 48, "ROOM": 64, "PARTS": 1, "SLICE": 4096}),
            ("swiglu", {"Z": 16, "ROOM": 64, "PARTS": 4, "SLICE": 1024}),
        ):
            yield rows_kernel, _of(rows_kernel, arrays), sizes | rest | {"KIND": kind}, {"num_warps": 8}


def _of(kernel, arrays: dict[str, str]) -> dict[str, str]:
    return {name: dtype for name, dtype in arrays.items() if name in kernel.arg_names}
