"""Attention of a few new positions to what a cache holds (see `op`), and how the cache is stored (see `stack`)."""

from pallas_kernels.decode_attention.op import decode_attention
from pallas_kernels.decode_attention.stack import KVStack, append, as_integers, storage_obstacle, turn_and_append

__all__ = ["KVStack", "append", "as_integers", "decode_attention", "storage_obstacle", "turn_and_append"]
