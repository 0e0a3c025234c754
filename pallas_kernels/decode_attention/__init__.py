"""Attention of new positions to what a cache holds, of few (see `op`; with their keys put there, `whole`) and of many (see
`chunk`); its storage (see `stack`).
"""

from pallas_kernels.decode_attention.chunk import chunk_attention
from pallas_kernels.decode_attention.op import LINES, decode_attention
from pallas_kernels.decode_attention.stack import KVStack, append, as_integers, storage_obstacle, turn_and_append
from pallas_kernels.decode_attention.whole import append_and_attend

__all__ = [
    "LINES",
    "KVStack",
    "append",
    "append_and_attend",
    "as_integers",
    "chunk_attention",
    "decode_attention",
    "storage_obstacle",
    "turn_and_append",
]
