"""Attention of a few new positions to what a cache holds: see `op`."""

from pallas_kernels.decode_attention.op import decode_attention

__all__ = ["decode_attention"]
