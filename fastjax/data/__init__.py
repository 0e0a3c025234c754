"""Data sets to batches: records -> text -> token ids and labels -> rows -> int32 arrays. Each arrow is one module."""

from fastjax.data.batches import Batch, OwnRows, Position, RowSource, Step, batch_at, batches, in_order, steps_per_epoch
from fastjax.data.cache import read_examples, user_cache, write_examples
from fastjax.data.examples import Example, ExampleRecords, Examples, Report
from fastjax.data.options import DataOptions
from fastjax.data.packing import Rows, pack, unpacked
from fastjax.data.prefetch import Prefetched
from fastjax.data.records import Record, Unread, load_records
from fastjax.data.stream import StreamSource
from fastjax.data.tokenize import tokenize_batch, tokenize_dataset, tokenize_record

__all__ = [
    "Batch",
    "DataOptions",
    "Example",
    "ExampleRecords",
    "Examples",
    "OwnRows",
    "Position",
    "Prefetched",
    "Record",
    "Report",
    "RowSource",
    "Rows",
    "Step",
    "StreamSource",
    "Unread",
    "batch_at",
    "batches",
    "in_order",
    "load_records",
    "pack",
    "read_examples",
    "steps_per_epoch",
    "tokenize_batch",
    "tokenize_dataset",
    "tokenize_record",
    "unpacked",
    "user_cache",
    "write_examples",
]
