"""Triton kernels that split a packed q/k/v product and turn q and k, and the way back: a program a token."""

import triton
import triton.language as tl


@triton.jit
def _turn(source, target, cos, sin, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """HEADS heads of 2 HALF values from source to target; WIDTH is HALF's next power of two."""
    head = tl.arange(0, PADDED)[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (head < HEADS) & (pair < HALF)
    place = head * 2 * HALF + pair
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + place + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target + place, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(target + place + HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _angles(cos, sin, token, HALF: tl.constexpr, WIDTH: tl.constexpr):
    pair = tl.arange(0, WIDTH)
    place = token * HALF + pair
    c = tl.load(cos + place, mask=pair < HALF, other=0.0)
    s = tl.load(sin + place, mask=pair < HALF, other=0.0)
    return c[None, :], s[None, :]


@triton.jit
def _copy(source, target, SIZE: tl.constexpr, PADDED: tl.constexpr):
    place = tl.arange(0, PADDED)
    tl.store(target + place, tl.load(source + place, mask=place < SIZE), mask=place < SIZE)


@triton.jit
def split_kernel(
    qkv,
    cos,
    sin,
    q,
    k,
    v,
    Q: tl.constexpr,
    K: tl.constexpr,
    Q_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, token, HALF, WIDTH)
    row = qkv + token * STRIDE
    D: tl.constexpr = 2 * HALF
    _turn(row, q + token * Q * D, c, s, Q, Q_PADDED, HALF, WIDTH)
    _turn(row + Q * D, k + token * K * D, c, s, K, K_PADDED, HALF, WIDTH)
    _copy(row + (Q + K) * D, v + token * K * D, K * D, K_PADDED * 2 * WIDTH)


@triton.jit
def join_kernel(
    dq,
    dk,
    dv,
    cos,
    sin,
    out,
    Q: tl.constexpr,
    K: tl.constexpr,
    Q_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, token, HALF, WIDTH)
    row = out + token * STRIDE
    D: tl.constexpr = 2 * HALF
    _turn(dq + token * Q * D, row, c, -s, Q, Q_PADDED, HALF, WIDTH)
    _turn(dk + token * K * D, row + Q * D, c, -s, K, K_PADDED, HALF, WIDTH)
    _copy(dv + token * K * D, row + (Q + K) * D, K * D, K_PADDED * 2 * WIDTH)


def compile_cases():
    """What tests compile for every supported architecture."""
    sizes = {"Q": 32, "K": 8, "Q_PADDED": 32, "K_PADDED": 8, "HALF": 64, "WIDTH": 64, "STRIDE": 6144}
    angles = {"cos": "*fp32", "sin": "*fp32"}
    for dtype in ("*bf16", "*fp16", "*fp32"):
        yield split_kernel, {"qkv": dtype, "q": dtype, "k": dtype, "v": dtype} | angles, sizes, {"num_warps": 4}
        yield join_kernel, {"dq": dtype, "dk": dtype, "dv": dtype, "out": dtype} | angles, sizes, {"num_warps": 4}
