"""Data sets to batches: records -> token ids and labels -> rows -> int32 arrays. Each arrow is one module."""

from fastjax.data.batches import Batch, batch_at, batches, in_order, steps_per_epoch
from fastjax.data.packing import Rows, pack, unpacked
from fastjax.data.records import Record, load_records
from fastjax.data.tokenize import Example, tokenize_dataset, tokenize_record

__all__ = [
    "Batch",
    "Example",
    "Record",
    "Rows",
    "batch_at",
    "batches",
    "in_order",
    "load_records",
    "pack",
    "steps_per_epoch",
    "tokenize_dataset",
    "tokenize_record",
    "unpacked",
]
