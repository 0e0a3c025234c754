"""Root-mean-square norm: see `op`."""

from pallas_kernels.rms_norm.op import (
    rms_norm,
    rms_norm_backward,
    rms_norm_dweight,
    rms_norm_forward,
    rms_norm_reference,
)

__all__ = ["rms_norm", "rms_norm_backward", "rms_norm_dweight", "rms_norm_forward", "rms_norm_reference"]
