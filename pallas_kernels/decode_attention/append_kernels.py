"""What puts new positions into the cache: keys turned and values, in 8 bits with their scales, a head of a token a program; and
all that a layer does with new positions of short rows, a row's key head a program: that, and attention in one piece.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from dataclasses import replace

import triton
import triton.language as tl

from pallas_kernels.decode_attention.triton_kernels import CASE, OLDEST, attended, place_of
from pallas_kernels.decode_attention.work import Sizes


@triton.jit
def _put(first, second, place, codes, scales, pair, inside, W: tl.constexpr):
    """A vector of two halves at a place of the cache."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if W.coded:
        top = tl.max(tl.where(inside, tl.maximum(tl.abs(first), tl.abs(second)), 0.0), axis=0)
        scale = tl.where(top > 0, top / W.largest, 1.0)
        tl.store(scales + place, scale)
        first, second = first / scale, second / scale
        if W.largest == 127:
            first, second = tl.floor(first + 0.5), tl.floor(second + 0.5)
        first = tl.minimum(tl.maximum(first, -W.largest), W.largest)
        second = tl.minimum(tl.maximum(second, -W.largest), W.largest)
    dtype: tl.constexpr = codes.dtype.element_ty
    tl.store(codes + place * W.depth + pair, first.to(dtype), mask=inside)
    tl.store(codes + place * W.depth + W.half + pair, second.to(dtype), mask=inside)


@triton.jit
def append_kernel(
    qkv,
    cos,
    sin,
    lengths,
    layers,
    k_before,
    v_before,
    k_scales_before,
    v_scales_before,
    q,
    k,
    v,
    k_scales,
    v_scales,
    W: tl.constexpr,
):
    """One head of one token: q is turned, k turned and put into the cache, v put there. The cache is written in place."""
    token, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, W.wide // 2)
    inside = pair < W.half
    source = qkv + (token * W.all_heads + head).to(tl.int64) * W.depth + pair
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + W.half, mask=inside, other=0.0).to(tl.float32)
    turned = head < W.heads + W.kv_heads
    c = tl.where(turned, tl.load(cos + token * W.half + pair, mask=inside, other=0.0), 1.0)
    s = tl.where(turned, tl.load(sin + token * W.half + pair, mask=inside, other=0.0), 0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    first, second = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
    if head < W.heads:
        target = q + (token * W.heads + head).to(tl.int64) * W.depth + pair
        tl.store(target, first, mask=inside)
        tl.store(target + W.half, second, mask=inside)
    else:
        row, group = token // W.new, (head - W.heads) % W.kv_heads
        position = tl.load(lengths + row) + token % W.new
        if position < W.capacity:
            line = (tl.load(layers).to(tl.int64) * W.batch + row) * W.kv_heads + group
            place = line * W.capacity + position
            if turned:
                _put(first, second, place, k, k_scales, pair, inside, W)
            else:
                _put(first, second, place, v, v_scales, pair, inside, W)


@triton.jit
def whole_kernel(
    qkv,
    cos,
    sin,
    lengths,
    layers,
    k_before,
    v_before,
    k_scales_before,
    v_scales_before,
    out,
    k,
    v,
    k_scales,
    v_scales,
    W: tl.constexpr,
):
    """All that attention is for one row and one key head: append_kernel's part, then decode_kernel's in one piece. The keys and
    values put into the cache are read from it again, behind a barrier."""
    row, group = tl.program_id(0) // W.kv_heads, tl.program_id(0) % W.kv_heads
    dtype: tl.constexpr = qkv.dtype.element_ty
    length = tl.load(lengths + row)
    base = place_of(layers, row, group, W)
    pair = tl.arange(0, W.wide // 2)
    inside = pair < W.half
    NEW: tl.constexpr = W.new
    for i in tl.static_range(NEW):
        token = row * W.new + i
        c = tl.load(cos + token * W.half + pair, mask=inside, other=0.0)
        s = tl.load(sin + token * W.half + pair, mask=inside, other=0.0)
        key = qkv + (token * W.all_heads + W.heads + group).to(tl.int64) * W.depth + pair
        value = key + W.kv_heads * W.depth
        a = tl.load(key, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(key + W.half, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.load(value, mask=inside, other=0.0), tl.load(value + W.half, mask=inside, other=0.0)
        if length + i < W.capacity:
            place = base + length + i
            turned = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
            _put(turned[0], turned[1], place, k, k_scales, pair, inside, W)
            _put(first, second, place, v, v_scales, pair, inside, W)
    line = tl.arange(0, W.tall)
    columns = tl.arange(0, W.wide)
    there = line < W.lines
    real = there[:, None] & (columns < W.depth)[None, :]
    token = row * W.new + line // W.group
    source = qkv + (token * W.all_heads + group * W.group + line % W.group)[:, None].to(tl.int64) * W.depth
    angle = token[:, None] * W.half + (columns % W.half)[None, :]
    c, s = tl.load(cos + angle, mask=real, other=0.0), tl.load(sin + angle, mask=real, other=0.0)
    own = tl.load(source + columns[None, :], mask=real, other=0.0).to(tl.float32)
    other = tl.load(source + ((columns + W.half) % W.depth)[None, :], mask=real, other=0.0).to(tl.float32)
    queries = (own * c + tl.where((columns < W.half)[None, :], -other, other) * s).to(dtype)
    tl.debug_barrier()
    if W.coded:
        k_scales += base
        v_scales += base
    end, positions = tl.minimum(length + W.new, W.capacity), length + line // W.group
    sums, _ = attended(queries, k + base * W.depth, v + base * W.depth, k_scales, v_scales, 0, end, positions, W)
    place = (token * W.heads + group * W.group + line % W.group)[:, None].to(tl.int64) * W.depth + columns[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=real)


def compile_cases():
    """What tests compile for every supported architecture."""
    indices = {"lengths": "*i32", "layers": "*i32"}
    sizes = Sizes(batch=8, new=2, heads=32, kv_heads=8, capacity=4096, depth=128, stored="bfloat16")
    for name, stored in {"bf16": "bfloat16", "i8": "int8", "fp8e4nv": "float8_e4m3fn"}.items():
        kept = dict.fromkeys(("k", "v", "k_before", "v_before"), f"*{name}")
        scales = dict.fromkeys(("k_scales", "v_scales", "k_scales_before", "v_scales_before"), "*fp32")
        signature = indices | kept | scales | {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32"}
        options = {"oldest": OLDEST.get(name, 80)}
        if stored == sizes.stored:
            options |= {"num_warps": 4, "num_stages": 2}
            yield whole_kernel, signature | {"out": "*bf16"}, {"W": replace(CASE, factor=0.125, pieces=1)}, options
        else:
            case = {"W": replace(sizes, stored=stored)}
            yield append_kernel, signature | {"q": "*bf16"}, case, options | {"num_warps": 1}
