"""Prompts that a run continues at each evaluation, by the engine that serves users.

What cannot be continued is told before anything is trained, not at the first evaluation.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
from flax import nnx

from fastjax.errors import UserError
from fastjax.generate import Engine, Request, make_request
from fastjax.generate.engine import check_request
from fastjax.models import Llama

AT_ONCE = 64


def sample_requests(prompts: Sequence[str], tokenizer: Any, model: Any, max_new_tokens: int) -> list[Request]:
    """A request of each prompt, greedy; a chat template takes a prompt as the user's turn."""
    requests = [
        make_request(
            tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"],
            max_new_tokens=max_new_tokens,
            eos_token_id=model.end_tokens(tokenizer),
        )
        for text in (_as_turn(prompt, tokenizer) for prompt in prompts)
    ]
    for prompt, request in zip(prompts, requests, strict=True):
        try:
            check_request(request, model.config)
        except UserError as error:
            raise UserError(f"eval_prompts: {prompt[:40]!r} cannot be continued: {error}") from error
    return requests


def _as_turn(prompt: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"eval_prompts: the chat template takes no {prompt[:40]!r}: {error}.") from error


def continuations(
    definition: nnx.GraphDef[Llama], parameters: Sequence[nnx.State], requests: Sequence[Request], tokenizer: Any
) -> list[str]:
    """The text of each request, by the model with these parameters."""
    if not requests:
        return []
    *_, completions = Engine(nnx.merge(definition, *parameters), AT_ONCE).run(requests)
    return tokenizer.batch_decode([completion.tokens for completion in completions], skip_special_tokens=True)
