"""Cross entropy of a linear head: see `op`."""

from pallas_kernels.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_reference
from pallas_kernels.linear_cross_entropy.options import Options

__all__ = ["Options", "linear_cross_entropy", "linear_cross_entropy_reference"]
