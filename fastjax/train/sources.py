"""A data set and the settings of a run to the source of its batches; what cannot be trained on is told here."""

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import jax

from fastjax.data import (
    Examples,
    OwnRows,
    Record,
    Rows,
    RowSource,
    StreamSource,
    pack,
    read_examples,
    tokenize_batch,
    tokenize_dataset,
    unpacked,
    user_cache,
    write_examples,
)
from fastjax.distributed.roles import PROCESSES, is_writer, wait_for_all
from fastjax.errors import UserError
from fastjax.train.config import SFTConfig

type Source = RowSource | StreamSource


def make_source(
    dataset: Iterable[Record], tokenizer: Any, model: Any, args: SFTConfig, batch_size: int, own: OwnRows = None
) -> Source:
    """The training batches: of a data set with a length all rows are made now, of a stream as they are needed.

    `own` are the rows of a batch that this process lays out.
    """
    if isinstance(dataset, Sized):
        rows = make_rows(dataset, tokenizer, model, args, "train_dataset")
        return RowSource(rows, batch_size, args.gradient_accumulation_steps, args.seed, own)
    if args.max_steps < 1:
        raise UserError("train_dataset is a stream, which has no length: say with max_steps how long to train.")
    length = row_length(model, args)

    def tokenize(rows: Sequence[tuple[str, Record]]) -> Examples:
        examples = tokenize_batch(rows, tokenizer, max_length=length, options=args.data_options)
        check_vocabulary(examples, model, "train_dataset")
        return examples

    return StreamSource(
        dataset,
        tokenize,
        lambda examples: arrange(examples, length, args),
        length,
        batch_size,
        args.gradient_accumulation_steps,
        args.seed,
        own,
    )


def make_rows(dataset: Iterable[Record], tokenizer: Any, model: Any, args: SFTConfig, name: str) -> Rows:
    """All rows of a data set; `name` says in errors which one it is.

    Of several processes the first reads and tokenises it. The others need where examples begin, as all plan the same
    rows, and the tokens of their own rows: they map what the first one wrote.
    """
    length = row_length(model, args)
    if jax.process_count() == 1:
        examples = _tokenised(dataset, tokenizer, length, args)
    else:
        shared = Path(args.output_dir) / PROCESSES / f"{name}.safetensors"
        if is_writer():
            write_examples(shared, _tokenised(dataset, tokenizer, length, args))
        wait_for_all(f"{name} tokenised")
        examples = _shared(shared)
    if not len(examples):
        dropped = examples.report.dropped
        left = f"all its {len(dropped)} records were left out, the first because of {dropped[0]}" if dropped else ""
        raise UserError(f"{name} is empty: {left or 'give at least one record.'}")
    check_vocabulary(examples, model, name)
    return arrange(examples, length, args)


def _tokenised(dataset: Iterable[Record], tokenizer: Any, length: int, args: SFTConfig) -> Examples:
    progress = not args.disable_tqdm
    return tokenize_dataset(
        dataset, tokenizer, max_length=length, options=args.data_options, cache=user_cache(), progress=progress
    )


def _shared(path: Path) -> Examples:
    try:
        return read_examples(path)
    except OSError as error:
        raise UserError(
            f"{path}, where the first process has put its tokens, cannot be read ({error.strerror}): choose an output_dir"
            " on a disk that all processes see."
        ) from error


def row_length(model: Any, args: SFTConfig) -> int:
    return args.max_length or args.max_seq_length or model.max_seq_length


def arrange(examples: Examples, length: int, args: SFTConfig) -> Rows:
    return pack(examples, length) if args.packing else unpacked(examples, length)


def check_vocabulary(examples: Examples, model: Any, name: str) -> None:
    largest = examples.summary.largest
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{name} has token {largest}, beyond the model's vocabulary of {model.config.vocab_size}:"
            " use the tokenizer that belongs to the model."
        )


def describe_source(source: Source) -> str:
    """One line about the data: how much there is, and what became of records that did not fit."""
    if isinstance(source, StreamSource):
        return f"a stream, in rows of up to {source.row_length}"
    rows, report = source.rows, source.rows.examples.report
    parts = [f"{len(rows.examples):,} examples"]
    parts += [f"{report.cut:,} of them cut to {rows.row_length}"] if report.cut else []
    parts += [f"{report.split:,} records split"] if report.split else []
    parts += [f"{len(report.dropped):,} records left out"] if report.dropped else []
    full = f", {rows.efficiency:.1%} full" if rows.fixed else ""
    return f"{', '.join(parts)}, {rows.tokens:,} tokens, {len(rows):,} rows of up to {rows.row_length}{full}"
