"""`fastjax train CONFIG.yaml [key=value ...]`: one run, from its YAML file to its adapter."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastjax import FastLanguageModel, SFTTrainer, make_mesh
from fastjax.cli.config import load_datasets, load_run_config
from fastjax.cli.plan import check_fit
from fastjax.distributed.cluster import find_run
from fastjax.distributed.roles import is_writer
from fastjax.distributed.start import join
from fastjax.errors import check_writable
from fastjax.parallel.hosts import check_every_process_takes_part
from fastjax.train.room import find_room

EXAMPLE = "example: fastjax train configs/llama3.1-8b-qlora.yaml data.path=notes.jsonl train.learning_rate=1e-4"


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("train", help="fine-tune a model as a YAML file says", epilog=EXAMPLE)
    add_arguments(command)
    command.set_defaults(run=run)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="with sections model, lora, data and train")
    command.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="a setting in place of the file's, by its path"
    )
    command.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where the first one listens")
    command.add_argument("--processes", type=int, metavar="N", help="how many processes share the run")
    command.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")


def config_and_overrides(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The file and the key=value settings among the words after `train`."""
    parser = argparse.ArgumentParser(prog="fastjax train")
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    if options.coordinator or options.processes or options.process is not None:
        parser.error("--coordinator, --processes and --process are given by launch: leave them out.")
    return options.config, options.overrides


def run(options: argparse.Namespace) -> None:
    # What costs nothing to check comes first: a misspelt key or a broken data file must not wait for a model to load.
    config = load_run_config(options.config, options.overrides)
    check_writable(Path(config.train.output_dir))
    join(find_run(options.coordinator, options.processes, options.process, os.environ))
    train_dataset, eval_dataset = load_datasets(config, read=is_writer())
    mesh = make_mesh(**config.mesh) if config.mesh else None
    check_every_process_takes_part(mesh)
    check_fit(config, find_room(mesh))
    arguments = {"progress": sys.stderr.isatty(), **config.model}  # a bar is for terminals, not for log files
    model, tokenizer = FastLanguageModel.from_pretrained(**arguments, mesh=mesh)
    if config.lora is not None:
        model = FastLanguageModel.get_peft_model(model, **config.lora)
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset, args=config.train
    )
    trainer.train()
