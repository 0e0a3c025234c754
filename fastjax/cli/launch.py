"""`fastjax launch --processes N train CONFIG.yaml ...`: a run of several processes on this machine."""

import argparse
import os
import sys
from pathlib import Path

from fastjax.cli import train
from fastjax.cli.config import load_run_config
from fastjax.distributed.launch import launch
from fastjax.distributed.roles import PROCESSES
from fastjax.errors import UserError

EXAMPLE = "example: fastjax launch --processes 2 train configs/llama3.1-8b-qlora-8gpu.yaml data.path=notes.jsonl"


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("launch", help="train in several processes on this machine", epilog=EXAMPLE)
    command.add_argument(
        "--processes", type=int, required=True, metavar="N", help="how many; GPUs are divided among them"
    )
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="train ...", help="what each of them runs")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if words[:1] != ["train"]:
        raise UserError(f"fastjax launch runs `train CONFIG.yaml ...`, not {' '.join(words) or 'nothing'!r}.")
    if options.processes < 1:
        raise UserError(f"--processes {options.processes} must be at least 1.")
    # read here, where a mistake in it is told once
    config = load_run_config(*train.config_and_overrides(words[1:]))
    logs = Path(config.train.output_dir) / PROCESSES
    code = launch([sys.executable, "-m", "fastjax", *words], options.processes, logs, os.environ)
    if code:
        raise SystemExit(code)
