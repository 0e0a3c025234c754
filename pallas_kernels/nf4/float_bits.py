"""Float32 arithmetic that gives the same bits on every backend: work in float64, round to float32 on purpose.

Three things keep plain float32 expressions from being reproducible. XLA's CPU backend flushes denormals: arithmetic
reads and writes them as zero. Its GPU backend may divide approximately. Both may fuse a * b + c, skipping a rounding,
and both may drop a narrowing conversion that is followed by a widening one.

The functions here live in float64, where every float32 value, denormals included, is a normal number, and where
rounding a sum, a product or a quotient of float32 values once to float64 and once more to float32 equals rounding it
once (53 bits >= 2 * 24 + 2). `round_to_f32` is that second rounding, made with operations that no optimiser removes.
Values enter and leave through integers, which nothing flushes. Call them inside `jax.enable_x64(True)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIGN = np.uint32(0x8000_0000)
MAGNITUDE = np.uint32(0x7FFF_FFFF)
EXPONENT = np.uint32(0x7F80_0000)
MANTISSA = np.uint32(0x007F_FFFF)
SMALLEST_NORMAL = 2.0**-126
SMALLEST_DENORMAL = 2.0**-149


def f32_bits(x: jax.Array) -> jax.Array:
    """uint32 bits of the float32 that equals each finite float32, bfloat16 or float16 of x."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    half = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    if x.dtype == jnp.bfloat16:
        return half << 16
    # float16: move the exponent's bias from 15 to 127; its denormals are normal float32s, a mantissa times 2^-24.
    denormal = lax.bitcast_convert_type((half & 0x3FF).astype(jnp.float32) * 2.0**-24, jnp.uint32)
    normal = ((half & 0x7FFF) << 13) + (112 << 23)
    return jnp.where((half & 0x7C00) == 0, denormal, normal) | ((half & 0x8000) << 16)


def bits_to_f64(bits: jax.Array) -> jax.Array:
    """float64 value of float32 bits."""
    normal = lax.bitcast_convert_type(bits & MAGNITUDE, jnp.float32).astype(jnp.float64)
    denormal = (bits & MANTISSA).astype(jnp.float64) * SMALLEST_DENORMAL
    value = jnp.where((bits & EXPONENT) == 0, denormal, normal)
    return jnp.where(bits >= SIGN, -value, value)


def f32_to_f64(x: jax.Array) -> jax.Array:
    """float64 of float32, denormals kept."""
    return bits_to_f64(lax.bitcast_convert_type(x, jnp.uint32))


def round_to_f32(x: jax.Array) -> jax.Array:
    """float64 rounded to the nearest values that float32 has: ties to even, gradual underflow, overflow to inf."""
    denormal = jnp.round(x * 2.0**149) * SMALLEST_DENORMAL
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, denormal, lax.reduce_precision(x, 8, 23))


def f64_to_f32(x: jax.Array) -> jax.Array:
    """float64 -> float32, rounded to nearest even with gradual underflow, signs of zeros kept."""
    magnitude = jnp.abs(x)
    # Added to 2^-97, a float64 has its last bit at 2^-149: what is left below is the denormal's mantissa, rounded.
    denormal = lax.bitcast_convert_type(magnitude + 2.0**-97, jnp.uint64).astype(jnp.uint32)
    normal = lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.uint32)
    sign = (lax.bitcast_convert_type(x, jnp.uint64) >> 32).astype(jnp.uint32) & SIGN
    return lax.bitcast_convert_type(jnp.where(magnitude < SMALLEST_NORMAL, denormal, normal) | sign, jnp.float32)
