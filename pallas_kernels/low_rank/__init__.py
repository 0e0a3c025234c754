"""Low-rank products beside large ones: see `op`, `wide` for how a large product takes one along, `gradients`, and
`beside` for one made with its input.
"""

from pallas_kernels.low_rank.beside import norm_and_project, project, summands, swiglu_and_project
from pallas_kernels.low_rank.gradients import low_rank_gradients
from pallas_kernels.low_rank.op import low_rank_matmul
from pallas_kernels.low_rank.wide import contract_rows, project_into, room_for

__all__ = [
    "contract_rows",
    "low_rank_gradients",
    "low_rank_matmul",
    "norm_and_project",
    "project",
    "project_into",
    "room_for",
    "summands",
    "swiglu_and_project",
]
