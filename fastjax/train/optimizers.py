"""Optimizers by name, as Optax chains: clip the gradient, take a direction, decay, scale by the learning rate.

    p -= lr * (direction + weight_decay * p)        decay on all but biases and norms, as in Hugging Face's Trainer

| name       | direction                                                          | state, bytes a parameter |
|------------|--------------------------------------------------------------------|--------------------------|
| adamw      | torch.optim.AdamW's                                                | 8                        |
| adamw_8bit | the same from block-wise 8-bit moments, bitsandbytes' AdamW8bit    | 2.03                     |
| lion       | sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g                | 4                        |
| sgd        | g: no momentum, as Trainer's "sgd"                                 | 0                        |
| muon       | the momentum's nearest orthogonal matrix, by Newton-Schulz         | 4                        |
| adafactor  | g / sqrt(rank-one estimate of g^2), its RMS clipped to 1           | about 0                  |

Layers stacked in one array are treated as the separate tensors they are: Muon orthogonalises the matrix of each layer,
Adafactor factors and clips each, and a tensor is too small for 8 bits if it has fewer than 4096 values in a layer.
Choices where implementations differ:

- adamw_8bit keeps the moments of embeddings in 32 bits, as Trainer has bitsandbytes do: a batch touches few of their
  rows.
- lion takes (adam_beta1, adam_beta2) as its betas, as Trainer does; the paper's are (0.9, 0.99).
- muon: Nesterov momentum 0.95, five steps, update scaled by 0.2 sqrt(max(rows, columns)) so that its RMS is that of an
  AdamW update and AdamW's learning rate and decay carry over (torch.optim.Muon's "match_rms_adamw", which does not
  depend on which axis is the input). Vectors, embeddings and the head go by AdamW.
- adafactor is Trainer's: no relative steps, no scaling by the parameter, no momentum, every matrix factored whatever
  its size. optax.adafactor would leave LoRA factors whole, take a stack's layers for a matrix's side, and decay without
  the learning rate.
- max_grad_norm: torch divides by norm + 1e-6, Optax by the norm.
"""

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from fastjax.errors import UserError
from fastjax.train.adamw_8bit import MIN_8BIT_SIZE, KeyPath, scale_by_adam
from fastjax.train.param_rules import is_decayed, is_embedding, is_hidden_matrix, is_stacked, layer_size

ALIASES = {  # a paged optimizer is the same one, its state elsewhere; here it stays on the device
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "lion_32bit": "lion",
    "paged_lion_32bit": "lion",
}
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # what the RMS of an AdamW update is in practice


def make_optimizer(
    optim: str = "adamw_8bit",
    learning_rate: optax.ScalarOrSchedule = 2e-4,
    *,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """An optimizer by its TrainingArguments name. `max_grad_norm` of None or 0: gradients are not clipped."""
    name = resolve_name(optim)
    for key, value in (("adam_beta1", adam_beta1), ("adam_beta2", adam_beta2)):
        if not 0 <= value < 1:
            raise UserError(f"{key}={value!r} must be at least 0 and below 1.")
    not_negative = {"weight_decay": weight_decay, "adam_epsilon": adam_epsilon, "max_grad_norm": max_grad_norm or 0}
    for key, value in not_negative.items():
        if value < 0:
            raise UserError(f"{key}={value!r} must not be negative.")
    steps = [DIRECTIONS[name](adam_beta1, adam_beta2, adam_epsilon)]
    if max_grad_norm:
        steps.insert(0, optax.clip_by_global_norm(max_grad_norm))
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, mask=_decay_mask))
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def resolve_name(optim: str) -> str:
    """The optimizer a name or an alias of Hugging Face's means."""
    name = ALIASES.get(optim, optim)
    if name not in DIRECTIONS:
        near = difflib.get_close_matches(str(optim), [*DIRECTIONS, *ALIASES], n=1)
        raise UserError(
            f"optim={optim!r} is unknown{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"Valid: {', '.join(DIRECTIONS)}; also {', '.join(ALIASES)}."
        )
    return name


def muon(fallback: optax.GradientTransformation) -> optax.GradientTransformation:
    """Orthogonalised momentum for the matrices of the layers, `fallback` for the rest."""
    orthogonal = optax.contrib.scale_by_muon(
        beta=MUON_MOMENTUM,
        # The last two axes are the matrix, whatever is before them a batch.
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree),
    )
    matched = optax.stateless_with_tree_map(lambda u, _: u * (MUON_RMS * max(jnp.shape(u)[-2:]) ** 0.5))
    return optax.partition(
        {"muon": optax.chain(_promoting(orthogonal), matched), "fallback": fallback},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, param: "muon" if is_hidden_matrix(path, param) else "fallback", params
        ),
    )


def adafactor() -> optax.GradientTransformation:
    """The gradient over the root of a factored estimate of its square, its RMS clipped to 1."""
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    return per_layer(optax.chain(factored, optax.clip_by_block_rms(1.0)))


def per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to each tensor by itself, and to each layer of a stacked tensor by itself."""

    def over_layers(function: Callable, path: KeyPath, param: jax.Array) -> Callable:
        return jax.vmap(function) if is_stacked(path, param) else function

    def init(params: optax.Params) -> list[Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        return [over_layers(transformation.init, path, leaf)(leaf) for path, leaf in leaves]

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[Any, list[Any]]:
        gradients, tree = jax.tree_util.tree_flatten_with_path(updates)
        results = [
            over_layers(transformation.update, path, gradient)(gradient, leaf_state, param)
            for (path, gradient), leaf_state, param in zip(gradients, state, jax.tree.leaves(params), strict=True)
        ]
        return tree.unflatten(update for update, _ in results), [leaf_state for _, leaf_state in results]

    return optax.GradientTransformation(init, update)


def _has_8bit_moments(path: KeyPath, param: jax.Array) -> bool:
    return layer_size(path, param) >= MIN_8BIT_SIZE and not is_embedding(path)


def _decay_mask(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _promoting(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets a transformation of Optax's promote dtypes implicitly where the caller's settings forbid it."""
    standard = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformation(standard(transformation.init), standard(transformation.update))


DIRECTIONS: dict[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    "adamw": lambda b1, b2, eps: scale_by_adam(b1, b2, eps),
    "adamw_8bit": lambda b1, b2, eps: scale_by_adam(b1, b2, eps, quantize=_has_8bit_moments),
    "lion": lambda b1, b2, eps: optax.scale_by_lion(b1, b2),
    "sgd": lambda b1, b2, eps: optax.identity(),
    "muon": lambda b1, b2, eps: muon(fallback=scale_by_adam(b1, b2, eps)),
    "adafactor": lambda b1, b2, eps: adafactor(),
}
