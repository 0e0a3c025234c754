"""Asks a model questions. As a program, `python -m fastjax.demo.answers DIRECTORY`, it loads the adapter in DIRECTORY,
reads a JSON list of prompts from its input and writes the JSON list of answers: the demo's proof that what was exported
is all there is to the tuned model.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastjax.api import FastLanguageModel

LONGEST = 10  # tokens; an answer is one name


def ask(model: FastLanguageModel, prompts: Sequence[str]) -> list[str]:
    """The likeliest continuation of each prompt, without surrounding space or a closing full stop."""
    tokens = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = FastLanguageModel.for_inference(model).generate(tokens, max_new_tokens=LONGEST)
    new = [row[len(prompt) :] for row, prompt in zip(rows, tokens, strict=True)]
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip().removesuffix(".") for row in new]


def ask_in_fresh_process(directory: Path, prompts: Sequence[str]) -> list[str]:
    """The same answers from a new Python that knows nothing but the adapter's directory."""
    command = [sys.executable, "-m", "fastjax.demo.answers", str(directory)]
    done = subprocess.run(command, input=json.dumps(prompts), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    model, _ = FastLanguageModel.from_pretrained(sys.argv[1], dtype="float32", load_in_4bit=True, progress=False)
    json.dump(ask(model, json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
