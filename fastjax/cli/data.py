"""`fastjax data CONFIG.yaml [key=value ...]`: what the model will see, before anything is trained."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastjax.api import load_tokenizer
from fastjax.cli.config import RunConfig, load_datasets, load_run_config
from fastjax.data import Example, Rows, RowSource
from fastjax.data.plot import plot_lengths
from fastjax.errors import UserError, check_writable
from fastjax.train.sources import make_source
from fastjax.weights.checkpoint import resolve_checkpoint

EXAMPLE = "example: fastjax data configs/llama3.1-8b-qlora.yaml data.path=notes.jsonl --rows 5"
LEARNT, OTHER, RESET = "\033[32m", "\033[2m", "\033[0m"
MOST_FAULTS = 10
PLOT_NAME = "lengths.png"


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("data", help="what the model will see of a data set", epilog=EXAMPLE)
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file `fastjax train` takes")
    command.add_argument("overrides", nargs="*", default=(), metavar="key=value", help="as for `fastjax train`")
    command.add_argument("--rows", type=int, default=3, metavar="N", help="examples to show; default: 3")
    command.add_argument("--full", action="store_true", help="show examples to their end")
    command.set_defaults(run=run)


class _Sizes:
    """All that making batches asks of a model, which is not loaded."""

    def __init__(self, max_seq_length: int, vocab_size: int) -> None:
        self.max_seq_length = max_seq_length
        self.config = self
        self.vocab_size = vocab_size


def run(options: argparse.Namespace) -> None:
    config = load_run_config(options.config, options.overrides)
    check_writable(Path(config.train.output_dir))
    dataset, _ = load_datasets(config)
    tokenizer = load_tokenizer(resolve_checkpoint(config.model["model_name"]))
    if tokenizer is None:
        raise UserError(f"{config.model['model_name']!r} came without a tokenizer, so its text cannot be shown.")
    sizes: Any = _Sizes(config.model.get("max_seq_length", 2048), len(tokenizer))
    source = make_source(dataset, tokenizer, sizes, config.train, config.train.per_device_train_batch_size)
    if not isinstance(source, RowSource):
        source = _first_window(source)
    examples = source.rows.examples
    print("\n".join(report(config, source)))
    path = Path(config.train.output_dir) / PLOT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_lengths(examples.lengths, source.rows.row_length, path, config.data_path)
    print(f"lengths of the examples: {path}")
    width = None if options.full else 600
    for index in np.linspace(0, len(examples) - 1, min(options.rows, len(examples)), dtype=int).tolist():
        print(f"\nexample {index}, {examples.lengths[index]:,} tokens")
        print(shown(examples[index], tokenizer, sys.stdout.isatty(), width))


def _first_window(source: Any) -> RowSource:
    """Of a stream, what its first steps train on."""
    window = next(source.windows())
    return RowSource(source.arrange(window), source.batch_size, source.accumulation, source.seed)


def report(config: RunConfig, source: RowSource) -> list[str]:
    rows: Rows = source.rows
    examples, lengths, per_step = rows.examples, rows.examples.lengths, source.batch_size * source.accumulation
    counts = examples.report
    streamed = ", the beginning of a stream" if config.streaming else ""
    lines = [
        f"{config.data_path}: {counts.records:,} records{streamed}",
        f"examples  {len(examples):,}; {counts.cut:,} cut to {rows.row_length:,} tokens, {counts.split:,} split,"
        f" {len(counts.dropped):,} records left out",
    ]
    lines += [f"          left out: {fault}" for fault in counts.dropped[:MOST_FAULTS]]
    lines += [f"          and {len(counts.dropped) - MOST_FAULTS:,} more"] * (len(counts.dropped) > MOST_FAULTS)
    low, high = np.percentile(lengths, [50, 95])
    lines += [
        f"tokens    {rows.tokens:,} an epoch, {examples.trained.mean():.1%} of them learnt; an example has"
        f" {lengths.mean():,.0f} on average, median {low:,.0f}, 95 % up to {high:,.0f}, the longest {lengths.max():,}",
        f"rows      {len(rows):,} of up to {rows.row_length:,} tokens"
        + (f", {rows.efficiency:.1%} full" if rows.fixed else ", one example each")
        + f"; {source.steps_per_epoch:,} steps of {per_step} rows an epoch",
    ]
    return lines


def shown(example: Example, tokenizer: Any, colours: bool, width: int | None) -> str:
    """The text of an example, what is learnt of it in colour, or between {+ and +}."""
    start, stop = (LEARNT, RESET) if colours else ("{+", "+}")
    pieces, used = [], 0
    for learnt, ids in stretches(example):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if width is not None and used + len(text) > width:
            text = f"{text[: width - used]} ..."
        used += len(text)
        other = f"{OTHER}{text}{RESET}" if colours else text
        pieces.append(f"{start}{text}{stop}" if learnt else other)
        if width is not None and used >= width:
            break
    return "".join(pieces)


def stretches(example: Example) -> list[tuple[bool, np.ndarray]]:
    """(learnt or not, the tokens) of each stretch; the first token of an example is never learnt."""
    learnt = example.labels >= 0
    learnt[:1] = False
    borders = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(learnt)]
    return [(bool(learnt[a]), example.input_ids[a:b]) for a, b in itertools.pairwise(borders)]
