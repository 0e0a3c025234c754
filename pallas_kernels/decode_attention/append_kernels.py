"""What puts new positions into the cache: keys turned and values, in 8 bits with their scales, a head of a token a program; and
all that a layer does with new positions of short rows, a row's key head a program: that, and attention in one piece.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from pallas_kernels.decode_attention.triton_kernels import STORED, attended


@triton.jit
def _put(first, second, place, codes, scales, pair, inside, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """A vector of two halves at a place of the cache."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if LARGEST > 0:
        top = tl.max(tl.where(inside, tl.maximum(tl.abs(first), tl.abs(second)), 0.0), axis=0)
        scale = tl.where(top > 0, top / LARGEST, 1.0)
        tl.store(scales + place, scale)
        first, second = first / scale, second / scale
        if LARGEST == 127:
            first, second = tl.floor(first + 0.5), tl.floor(second + 0.5)
        first = tl.minimum(tl.maximum(first, -LARGEST), LARGEST)
        second = tl.minimum(tl.maximum(second, -LARGEST), LARGEST)
    dtype: tl.constexpr = codes.dtype.element_ty
    tl.store(codes + place * 2 * HALF + pair, first.to(dtype), mask=inside)
    tl.store(codes + place * 2 * HALF + HALF + pair, second.to(dtype), mask=inside)


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
    BATCH: tl.constexpr,
    NEW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One head of one token: q is turned, k turned and put into the cache, v put there. The cache is written in place."""
    token, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, WIDTH)
    inside = pair < HALF
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head).to(tl.int64) * 2 * HALF + pair
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    turned = head < HEADS + KV_HEADS
    c = tl.where(turned, tl.load(cos + token * HALF + pair, mask=inside, other=0.0), 1.0)
    s = tl.where(turned, tl.load(sin + token * HALF + pair, mask=inside, other=0.0), 0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    first, second = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
    if head < HEADS:
        target = q + (token * HEADS + head).to(tl.int64) * 2 * HALF + pair
        tl.store(target, first, mask=inside)
        tl.store(target + HALF, second, mask=inside)
    else:
        row, group = token // NEW, (head - HEADS) % KV_HEADS
        position = tl.load(lengths + row) + token % NEW
        if position < CAPACITY:
            line = (tl.load(layers).to(tl.int64) * BATCH + row) * KV_HEADS + group
            place = line * CAPACITY + position
            if turned:
                _put(first, second, place, k, k_scales, pair, inside, HALF, LARGEST)
            else:
                _put(first, second, place, v, v_scales, pair, inside, HALF, LARGEST)


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
    FACTOR: tl.constexpr,
    BATCH: tl.constexpr,
    NEW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
    LARGEST: tl.constexpr,
    PTX: tl.constexpr,
):
    """All that attention is for one row and one key head: append_kernel's part, then decode_kernel's in one piece. The keys and
    values put into the cache are read from it again, behind a barrier."""
    row, group = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    size: tl.constexpr = HEADS // KV_HEADS
    D: tl.constexpr = 2 * HALF
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    length = tl.load(lengths + row)
    base = (tl.load(layers).to(tl.int64) * BATCH + row) * KV_HEADS * CAPACITY + group * CAPACITY
    pair = tl.arange(0, WIDTH)
    inside = pair < HALF
    for i in tl.static_range(NEW):
        token = row * NEW + i
        c = tl.load(cos + token * HALF + pair, mask=inside, other=0.0)
        s = tl.load(sin + token * HALF + pair, mask=inside, other=0.0)
        key = qkv + (token * ALL + HEADS + group).to(tl.int64) * D + pair
        value = key + KV_HEADS * D
        a = tl.load(key, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(key + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.load(value, mask=inside, other=0.0), tl.load(value + HALF, mask=inside, other=0.0)
        if length + i < CAPACITY:
            place = base + length + i
            turned = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
            _put(turned[0], turned[1], place, k, k_scales, pair, inside, HALF, LARGEST)
            _put(first, second, place, v, v_scales, pair, inside, HALF, LARGEST)
    line = tl.arange(0, GP)
    columns = tl.arange(0, 2 * WIDTH)
    there = line < NEW * size
    real = there[:, None] & (columns < D)[None, :]
    token = row * NEW + line // size
    source = qkv + (token * ALL + group * size + line % size)[:, None].to(tl.int64) * D
    angle = token[:, None] * HALF + (columns % HALF)[None, :]
    c, s = tl.load(cos + angle, mask=real, other=0.0), tl.load(sin + angle, mask=real, other=0.0)
    own = tl.load(source + columns[None, :], mask=real, other=0.0).to(tl.float32)
    other = tl.load(source + ((columns + HALF) % D)[None, :], mask=real, other=0.0).to(tl.float32)
    queries = (own * c + tl.where((columns < HALF)[None, :], -other, other) * s).to(dtype)
    tl.debug_barrier()
    if LARGEST > 0:
        k_scales += base
        v_scales += base
    sums, _ = attended(
        queries,
        k + base * D,
        v + base * D,
        k_scales,
        v_scales,
        0,
        tl.minimum(length + NEW, CAPACITY),
        length + line // size,
        FACTOR,
        0,
        NEW,
        D,
        2 * WIDTH,
        GP,
        BN,
        LARGEST > 0,
        PTX,
    )
    place = (token * HEADS + group * size + line % size)[:, None].to(tl.int64) * D + columns[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=real)


def compile_cases():
    """What tests compile for every supported architecture."""
    indices = {"lengths": "*i32", "layers": "*i32"}
    sizes = {"BATCH": 8, "NEW": 2, "HEADS": 32, "KV_HEADS": 8, "CAPACITY": 4096, "HALF": 64, "WIDTH": 64}
    for name, (largest, oldest) in STORED.items():
        kept = dict.fromkeys(("k", "v", "k_before", "v_before"), f"*{name}")
        scales = dict.fromkeys(("k_scales", "v_scales", "k_scales_before", "v_scales_before"), "*fp32")
        signature = indices | kept | scales | {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32"}
        if largest:
            rest = sizes | {"LARGEST": largest}
            yield append_kernel, signature | {"q": "*bf16"}, rest, {"num_warps": 1, "oldest": oldest}
        else:
            rest = sizes | {"LARGEST": largest, "NEW": 1, "FACTOR": 0.125, "GP": 16, "BN": 64, "PTX": True}
            yield whole_kernel, signature | {"out": "*bf16"}, rest, {"num_warps": 4, "num_stages": 2, "oldest": oldest}
