"""A layer for a few tokens, from its attention to the next layer's queries, keys and values: see `op`."""

from pallas_kernels.between_attentions.op import Factors, Layers, between_attentions, new_counts, obstacle

__all__ = ["Factors", "Layers", "between_attentions", "new_counts", "obstacle"]
