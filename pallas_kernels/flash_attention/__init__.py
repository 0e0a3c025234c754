"""Attention over queries that share key/value heads: see `op.py` for the math, the options and what runs where."""

from pallas_kernels.flash_attention.op import (
    AttentionSaved,
    attention_backward,
    attention_forward,
    attention_known,
    attention_part_backward,
    flash_attention,
)
from pallas_kernels.flash_attention.options import Options
from pallas_kernels.flash_attention.parts import joined, known
from pallas_kernels.flash_attention.segments import SegmentMetadata, segment_metadata
from pallas_kernels.flash_attention.xla import flash_attention_reference

__all__ = [
    "AttentionSaved",
    "Options",
    "SegmentMetadata",
    "attention_backward",
    "attention_forward",
    "attention_known",
    "attention_part_backward",
    "flash_attention",
    "flash_attention_reference",
    "joined",
    "known",
    "segment_metadata",
]
