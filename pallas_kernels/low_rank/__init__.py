"""Low-rank products beside large ones: see `op`, and `wide` for how a large product takes one along."""

from pallas_kernels.low_rank.op import low_rank_matmul
from pallas_kernels.low_rank.wide import contract_rows, project_into, room_for

__all__ = ["contract_rows", "low_rank_matmul", "project_into", "room_for"]
