"""NF4 weights: packing, unpacking and the frozen linear over them, bit-identical to bitsandbytes."""

from pallas_kernels.nf4.array import NF4Array, NF4Slice, check_nf4, nf4_partition_specs
from pallas_kernels.nf4.dequantize import dequantize_nf4
from pallas_kernels.nf4.grouped import FEW, LowRank, Ready, linears, padded_rank, ready, room_beside
from pallas_kernels.nf4.matmul import nf4_matmul
from pallas_kernels.nf4.matvec import matvec_obstacle, nf4_matvec
from pallas_kernels.nf4.products import input_gradient, product
from pallas_kernels.nf4.quantize import all_finite, quantize_nf4
from pallas_kernels.nf4.slices import unpack_slices

__all__ = [
    "FEW",
    "LowRank",
    "NF4Array",
    "NF4Slice",
    "Ready",
    "all_finite",
    "check_nf4",
    "dequantize_nf4",
    "input_gradient",
    "linears",
    "matvec_obstacle",
    "nf4_matmul",
    "nf4_matvec",
    "nf4_partition_specs",
    "padded_rank",
    "product",
    "quantize_nf4",
    "ready",
    "room_beside",
    "unpack_slices",
]
