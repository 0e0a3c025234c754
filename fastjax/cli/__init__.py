"""The command line: `fastjax COMMAND ...`, or `python -m fastjax COMMAND ...`.

Exit codes: 0, 2 for a mistake of the user's, told in one sentence without a traceback, 130 for Ctrl-C and 143 for SIGTERM.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

import jax

import fastjax
from fastjax.cli import data, export, generate, launch, plan, train
from fastjax.distributed.absent import is_of_another, who_is_gone
from fastjax.distributed.launch import ProcessFailed
from fastjax.distributed.start import leave_at_once, name_of_this
from fastjax.errors import UserError
from fastjax.train.interrupts import Interrupted

PACKAGES = ("fastjax", "pallas_kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    if not all(hasattr(options, "overrides") and "=" in word and not word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no key=value that follows an option
        options.overrides = [*options.overrides, *rest]
    try:
        options.run(options)
    except Interrupted as stop:
        print(f"\nfastjax: {stop}", file=sys.stderr)
        return stop.exit_code
    except ProcessFailed as failure:
        print(f"\n{failure.last_words}fastjax: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\nfastjax: interrupted", file=sys.stderr)
        leave_at_once(130)
        return 130
    except Exception as error:
        if jax.distributed.is_initialized() and is_of_another(error) and not options.traceback:
            print(f"\nfastjax: {name_of_this()}{who_is_gone(error)}", file=sys.stderr)
            leave_at_once(1)
        if options.traceback or not is_users_mistake(error):
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            leave_at_once(1)
        print(f"fastjax: {name_of_this()}{error}", file=sys.stderr)
        leave_at_once(2)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastjax", description="Fine-tuning of Llama-family language models in JAX.")
    parser.add_argument("--version", action="version", version=f"fastjax {fastjax.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add_command(commands)
    launch.add_command(commands)
    plan.add_command(commands)
    data.add_command(commands)
    generate.add_commands(commands)
    export.add_command(commands)
    return parser


def is_users_mistake(error: Exception) -> bool:
    """Whether the message alone will do: our own complaint about a value, or what the operating system refused."""
    if not isinstance(error, ValueError | OSError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES
    return isinstance(error, UserError | OSError) or ours
