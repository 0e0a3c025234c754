"""The keys and values of all layers, as a cache stores them: in a model's own dtype, or in 8 bits with a scale each.

A key or value of D numbers is stored in 8 bits as codes and one float32 scale: the largest of the D lands on the largest
code. So a token's outliers cost no other token anything, a written position is never touched again, and the scales,
which are 4 bytes for D, stay out of the products: a logit is multiplied by its key's scale, a weight by its value's.

    int8             codes -127..127, an error of at most 1/254 of the vector's largest number
    float8_e4m3fn    codes up to 448, an error of at most 1/16 of each number (below 2^-6, of 2^-10)

All layers lie in one array each, and a layer is named by its index: a loop over layers then writes and reads its own
where they lie, and no layer's keys are copied out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.work import LARGEST, Sizes
from pallas_kernels.dispatch import choose_implementation
from pallas_kernels.rope import rope_qkv
from pallas_kernels.triton_call import triton_call, triton_obstacle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVStack:
    """Keys and values of L layers, B rows, K heads and C positions."""

    keys: Float[Array, "L B K C D"]
    values: Float[Array, "L B K C D"]
    key_scales: Float[Array, "L B K C"] | None = None  # None: stored as they are
    value_scales: Float[Array, "L B K C"] | None = None

    @classmethod
    def empty(cls, layers: int, batch: int, kv_heads: int, capacity: int, depth: int, dtype: Any) -> "KVStack":
        shape = (layers, batch, kv_heads, capacity, depth)
        keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        if jnp.dtype(dtype) not in LARGEST:
            return cls(keys, values)
        return cls(keys, values, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


def quantized(x: Float[Array, "... D"], dtype: Any) -> tuple[Float[Array, "... D"], Float[Array, "..."]]:
    """Codes and scales: x is about codes * scales."""
    largest = LARGEST[jnp.dtype(dtype)]
    wide = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.where(top > 0, top / largest, 1.0)
    codes = wide / scales[..., None]
    if jnp.dtype(dtype) == jnp.int8:
        codes = jnp.floor(codes + 0.5)
    return jnp.clip(codes, -largest, largest).astype(dtype), scales


def as_integers(x: jax.Array) -> jax.Array:
    """The bits of fp8, which not every operation on arrays is made for; anything else as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.int8) if x.dtype == jnp.float8_e4m3fn else x


def append(
    stack: KVStack,
    layer: Int[Array, ""],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    lengths: Int[Array, "B"],
) -> KVStack:
    """The stack with new keys and values of a layer behind the `lengths` positions of each row; what does not fit is left
    out.
    """
    rows = jnp.arange(k.shape[0])[:, None]
    places = lengths[:, None] + jnp.arange(k.shape[1], dtype=lengths.dtype)[None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = as_integers(new.astype(old.dtype))
        written = as_integers(old).at[layer, rows, :, places].set(new, mode="drop", unique_indices=True)
        return jax.lax.bitcast_convert_type(written, old.dtype)

    if stack.key_scales is None or stack.value_scales is None:
        return KVStack(put(stack.keys, k), put(stack.values, v))
    (k, k_scales), (v, v_scales) = quantized(k, stack.keys.dtype), quantized(v, stack.values.dtype)
    return KVStack(
        put(stack.keys, k), put(stack.values, v), put(stack.key_scales, k_scales), put(stack.value_scales, v_scales)
    )


def turn_and_append(
    stack: KVStack,
    layer: Int[Array, ""],
    qkv: Float[Array, "T (N+2K)*D"],
    cos: Float[Array, "B S D/2"],
    sin: Float[Array, "B S D/2"],
    lengths: Int[Array, "B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S N D"], KVStack]:
    """q and k of a packed q/k/v product turned, k and v written behind each row's positions: q, and the stack. T = B S."""
    sizes = sizes_of(stack, qkv, cos)
    obstacles = {"triton": storage_obstacle(stack.keys.dtype) or triton_obstacle(), "xla": None}
    if choose_implementation("turn_and_append", implementation, obstacles) == "xla":
        q, k, v = rope_qkv(qkv, cos, sin, sizes.heads, sizes.kv_heads)
        return q, append(stack, layer, k, v, lengths)
    from pallas_kernels.decode_attention.append_kernels import append_kernel

    grid = sizes.batch * sizes.new, sizes.all_heads
    return written_in_place(append_kernel, sizes, stack, layer, qkv, cos, sin, lengths, grid=grid, num_warps=1)


def written_in_place(
    kernel: Any,
    work: Sizes,
    stack: KVStack,
    layer: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    lengths: jax.Array,
    **options: Any,
) -> tuple[Float[Array, "B S N D"], KVStack]:
    """What a kernel of append_kernels.py makes of the queries, and the stack that it wrote keys and values into."""
    scales = [] if stack.key_scales is None else [stack.key_scales, stack.value_scales]
    places = [stack.keys, stack.values, *scales]
    spare = jax.ShapeDtypeStruct((1,), jnp.float32)
    made, *written = triton_call(
        kernel,
        qkv,
        cos,
        sin,
        lengths,
        layer[None],
        *places,
        *([] if scales else [cos, cos]),
        out=(
            jax.ShapeDtypeStruct((work.batch, work.new, work.heads, work.depth), qkv.dtype),
            *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in places),
            *([] if scales else [spare, spare]),
        ),
        aliases={5 + index: 1 + index for index in range(len(places))},
        W=work,
        **options,
    )
    return made, KVStack(*written[: len(places)])


def sizes_of(stack: KVStack, qkv: Float[Array, "T (N+2K)*D"], cos: Float[Array, "B S D/2"]) -> Sizes:
    _, batch, kv_heads, capacity, depth = stack.keys.shape
    heads = qkv.shape[1] // depth - 2 * kv_heads
    return Sizes(batch, cos.shape[1], heads, kv_heads, capacity, depth, jnp.dtype(stack.keys.dtype).name)


def storage_obstacle(dtype: Any, capability: tuple[int, int] | None = None) -> str | None:
    """Why a GPU of this capability (that of the GPU here) cannot read or write what is stored like this, or None."""
    from pallas_kernels.dispatch import cuda_capability

    capability = capability or cuda_capability()
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and capability is not None and capability < (8, 9):
        return (
            f"float8_e4m3fn takes an NVIDIA GPU of compute capability 8.9 or later, not {capability[0]}.{capability[1]}"
        )
    return None
