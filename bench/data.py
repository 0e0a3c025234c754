"""How fast records become batches: tokens a second of tokenising, of packing, and of the loader that a run waits for.

    python -m bench.data [--tokens 3000000] [--out FILE]

Text is the standard library's, the tokenizer a byte-level BPE of 32,000 words trained on it. Chats are made of the same
text. Each figure is the best of three.
"""

import argparse
import itertools
import json
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.record import write_record
from fastjax.data import DataOptions, Prefetched, RowSource, pack, tokenize_dataset

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
MARKED = TEMPLATE.replace("{{ m.content }}</s>", "{% generation %}{{ m.content }}</s>{% endgeneration %}")
ROW = 2048


def documents(characters: int = 2400) -> list[str]:
    """The standard library's sources in pieces."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(errors="ignore")
        texts += [text[at : at + characters] for at in range(0, len(text), characters)]
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=32000, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def data_sets(texts: list[str], count: int) -> dict[str, list[dict[str, Any]]]:
    many = list(itertools.islice(itertools.cycle(texts), count))
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in many]
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    return {
        "text": [{"text": text} for text in many],
        "prompt and completion": [{"prompt": prompt, "completion": completion} for prompt, completion in halves],
        "messages": [{"messages": [turn("user", prompt), turn("assistant", answer)]} for prompt, answer in halves],
    }


def best_seconds(function: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    result, best = None, float("inf")
    for _ in range(times):
        began = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - began)
    return best, result


def measure(tokens: int) -> dict[str, Any]:
    texts = documents()
    tokenizer = make_tokenizer(texts)
    results: dict[str, Any] = {"cores": os.cpu_count(), "tokens_per_second": {}}
    sets = data_sets(texts, tokens // 560)
    cases = [(name, sets[name], DataOptions(), TEMPLATE) for name in sets]
    answers = DataOptions(assistant_only_loss=True)
    cases += [
        ("answers by the template's growth", sets["messages"], answers, TEMPLATE),
        ("answers by {% generation %}", sets["messages"], answers, MARKED),
    ]
    examples = None
    for name, records, options, template in cases:
        tokenizer.chat_template = template
        run = lambda r=records, o=options: tokenize_dataset(r, tokenizer, max_length=ROW, options=o)  # noqa: E731
        seconds, made = best_seconds(run)
        results["tokens_per_second"][f"tokenising {name}"] = round(len(made.tokens) / seconds)
        examples = examples or made
    assert examples is not None
    seconds, rows = best_seconds(lambda: pack(examples, ROW))
    results["tokens_per_second"]["packing"] = round(rows.tokens / seconds)
    results["packed"] = round(rows.efficiency, 4)
    source = RowSource(rows, batch_size=8, accumulation=1, seed=0)
    seconds, steps = best_seconds(lambda: sum(step.tokens for step in itertools.islice(source.steps(), 50)))
    results["tokens_per_second"]["batches of 8x2048"] = round(steps / seconds)
    results["wait"] = round(share_waited(source), 5)
    return results


def share_waited(source: RowSource, rate: float = 25_000, steps: int = 10) -> float:
    """The part of its time that a run waits for data whose steps, of 8x2048, take in so many tokens a second."""
    ahead = Prefetched(source.steps())
    next(ahead)
    before, began = ahead.waited, time.perf_counter()
    for _ in range(steps):
        time.sleep(8 * ROW / rate)
        next(ahead)
    share = (ahead.waited - before) / (time.perf_counter() - began)
    ahead.close()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = measure(options.tokens)
    print(json.dumps(results, indent=1))
    if options.out:
        write_record(options.out, results)


if __name__ == "__main__":
    main()
