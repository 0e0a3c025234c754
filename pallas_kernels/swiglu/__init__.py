"""Llama's gated activation: see `op`; and over gate and up side by side: see `packed`."""

from pallas_kernels.swiglu.op import swiglu, swiglu_reference
from pallas_kernels.swiglu.packed import swiglu_backward, swiglu_forward

__all__ = ["swiglu", "swiglu_backward", "swiglu_forward", "swiglu_reference"]
