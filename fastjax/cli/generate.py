"""`fastjax generate` and `fastjax chat`: what a model says, as it says it."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from fastjax import FastLanguageModel, make_mesh
from fastjax.cli.config import parse_mesh
from fastjax.compile_cache import enable_compile_cache
from fastjax.errors import UserError
from fastjax.generate import Engine, make_request
from fastjax.generate.cache import EIGHT_BITS
from fastjax.generate.engine import check_request
from fastjax.weights.adapter import load_adapter

GENERATE_EXAMPLE = "example: fastjax generate --model outputs/llama3.1-8b-qlora --prompt 'Once upon a time'"
CHAT_EXAMPLE = "example: fastjax chat --model outputs/llama3.1-8b-qlora --system 'Answer briefly.'"
SAMPLING = (  # option, its type, default, metavar, help
    ("--temperature", float, 0.0, "T", "0 takes the likeliest token, above 0 draws"),
    ("--top-k", int, 0, "K", "draw from the K likeliest tokens, 0 from all"),
    ("--top-p", float, 1.0, "P", "draw from the likeliest tokens that make up P of all probability"),
    ("--min-p", float, 0.0, "P", "draw from tokens of at least P times the probability of the likeliest"),
    ("--repetition-penalty", float, 1.0, "X", "above 1 makes tokens less likely that the text has already"),
    ("--seed", int, 0, "N", "the same seed draws the same text"),
)
HELP = "/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer"


def add_commands(commands: argparse._SubParsersAction) -> None:
    one = commands.add_parser("generate", help="continue a prompt", epilog=GENERATE_EXAMPLE)
    one.add_argument("--prompt", required=True, help="the text to continue; - reads it from the standard input")
    one.add_argument(
        "--chat", action="store_true", help="put the prompt through the chat template, as the user's words"
    )
    one.set_defaults(run=run_generate)
    chat = commands.add_parser("chat", help="talk with a model", epilog=CHAT_EXAMPLE)
    chat.add_argument("--system", help="what the model is told first")
    chat.set_defaults(run=run_chat)
    for command in (one, chat):
        command.add_argument(
            "overrides",
            nargs="*",
            default=(),
            metavar="mesh.AXIS=N",
            help="divide the model over N devices, such as mesh.tensor=2",
        )
        command.add_argument("--model", required=True, help="a checkpoint or an adapter: a directory or a hub id")
        command.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to put on --model")
        command.add_argument("--dtype", default="bfloat16", help="what is computed in; default: bfloat16")
        command.add_argument("--16bit", dest="packed", action="store_false", help="leave the weights in 16 bits")
        command.add_argument(
            "--kv-cache-dtype", choices=EIGHT_BITS, help="store keys and values in 8 bits, for long texts"
        )
        command.add_argument(
            "--prompt-lookup",
            type=int,
            metavar="N",
            help="try N tokens at once that the text had before: sooner, no other",
        )
        command.add_argument(
            "--max-new-tokens", type=int, default=512, metavar="N", help="the most that are added; default: 512"
        )
        for name, kind, default, metavar, words in SAMPLING:
            command.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{words}; default: {default}")
        command.add_argument(
            "--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be given often"
        )


def load(options: argparse.Namespace) -> Any:
    mesh: dict[str, Any] = parse_mesh(options.overrides)
    enable_compile_cache()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model,
        dtype=options.dtype,
        load_in_4bit=options.packed,
        mesh=make_mesh(**mesh) if mesh else None,
        progress=sys.stderr.isatty(),
    )
    if options.adapter is not None:
        model.lora = load_adapter(options.adapter, model.module)
    if tokenizer is None:
        raise UserError(f"{options.model!r} came without a tokenizer, so it cannot be given text.")
    return FastLanguageModel.for_inference(model)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(options, name) for name in names} | {"stop_strings": options.stop}


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"kv_cache_dtype": options.kv_cache_dtype, "prompt_lookup_num_tokens": options.prompt_lookup}


def stream(model: FastLanguageModel, prompt: str | list[int], options: argparse.Namespace) -> Iterator[str]:
    return model.stream(prompt, **engine_settings(options), **settings(options))


def run_generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt:
        raise UserError("the prompt is empty: give --prompt some text.")
    model = load(options)
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": prompt}]) if options.chat else prompt
    print("" if options.chat else prompt, end="", flush=True)
    show(stream(model, ids, options))


def run_chat(options: argparse.Namespace) -> None:
    model = load(options)
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    # what no message could mend is told now: a template that is missing, a setting that is not valid
    prompt_ids(model.tokenizer, [*beginning, {"role": "user", "content": "?"}])
    check_request(make_request([0], tokenizer=model.tokenizer, **settings(options)), model.config)
    Engine(model.module, 1, **engine_settings(options))
    print(HELP)
    messages = list(beginning)
    while (said := ask()) != "/exit":
        if said == "/reset":
            messages = list(beginning)
        elif said:
            messages.append({"role": "user", "content": said})
            answer = []
            try:
                show(pieces_into(answer, stream(model, prompt_ids(model.tokenizer, messages), options)))
            except KeyboardInterrupt:
                pass  # what was said of it is kept
            except UserError as error:  # the conversation no longer fits; the user may still /reset it
                print(f"fastjax: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": "".join(answer)})


def ask() -> str:
    """What the user types next; the end of the input, and Ctrl-C at the prompt, are /exit."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/exit"


def prompt_ids(tokenizer: Any, messages: list[dict]) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use `fastjax generate` without --chat.")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template takes no such conversation: {error}.") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_into(answer: list[str], pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        answer.append(piece)
        yield piece


def show(pieces: Iterator[str]) -> None:
    """Prints pieces as they come, and on a terminal how fast that was."""
    began, first = time.perf_counter(), None
    try:
        for piece in pieces:
            first = first or time.perf_counter() - began
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    if sys.stderr.isatty() and first is not None:
        print(f"({first:.2f} s to the first word, {time.perf_counter() - began:.2f} s in all)", file=sys.stderr)
