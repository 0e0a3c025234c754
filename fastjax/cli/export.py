"""`fastjax export`: an adapter and its base as one checkpoint, as Hugging Face tools load it."""

import argparse
import sys
from pathlib import Path

from fastjax import FastLanguageModel
from fastjax.errors import UserError, check_writable
from fastjax.weights.adapter import load_adapter

EXAMPLE = "example: fastjax export --model outputs/llama3.1-8b-qlora --out merged"


def add_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "export", help="merge an adapter into its base, as a 16-bit checkpoint", epilog=EXAMPLE
    )
    command.add_argument("--model", required=True, help="an adapter or a checkpoint: a directory or a hub id")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to put on --model")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the checkpoint goes")
    command.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    command.add_argument(
        "--4bit", dest="packed", action="store_true", help="merge into the weights as training had them"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_writable(options.out)
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out} is not empty: give --out a directory that is, or a new one.")
    model, _ = FastLanguageModel.from_pretrained(
        options.model, dtype=options.dtype, load_in_4bit=options.packed, progress=sys.stderr.isatty()
    )
    if options.adapter is not None:
        model.lora = load_adapter(options.adapter, model.module)
    model.save_pretrained_merged(options.out)
    print(f"wrote {options.out}")
