"""GPU kernels for fine-tuning, arrays in and arrays out: packed 4-bit weights, attention, norms, losses.

Each op is one public function with its shapes in the signature, a plain-jnp reference of the same math beside it, and
one hand-derived backward pass shared by its implementations. The package stands alone: import just the op you need.
"""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.low_rank import low_rank_matmul
from pallas_kernels.nf4 import NF4Array, dequantize_nf4, nf4_matmul, nf4_matvec, quantize_nf4
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import apply_rope, rope_angles
from pallas_kernels.swiglu import swiglu

__all__ = [
    "NF4Array",
    "apply_rope",
    "decode_attention",
    "dequantize_nf4",
    "flash_attention",
    "linear_cross_entropy",
    "low_rank_matmul",
    "nf4_matmul",
    "nf4_matvec",
    "quantize_nf4",
    "rms_norm",
    "rope_angles",
    "swiglu",
]
