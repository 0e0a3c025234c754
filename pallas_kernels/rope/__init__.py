"""Rotary position embedding: see `op`; and the turn of a packed q/k/v product: see `packed`."""

from pallas_kernels.rope.op import apply_rope, apply_rope_reference, rope_angles
from pallas_kernels.rope.packed import rope_qkv, rope_qkv_backward

__all__ = ["apply_rope", "apply_rope_reference", "rope_angles", "rope_qkv", "rope_qkv_backward"]
