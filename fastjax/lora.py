"""LoRA on the linears of a model: W x + s B A x with A, B trained and W frozen.

s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. A starts as PEFT starts it (uniform within 1/sqrt(in)), B as
zero. LoRA is attached where it acts, as `linear.lora`. A and B are stacked over the layers like the weights they join;
where only some layers are to be trained, `scale` is zero at the others, and with it their output and gradients.
"""

import dataclasses
import math
import re
import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.errors import UserError
from fastjax.models.layers import Frozen, Linear
from fastjax.models.llama import Llama
from pallas_kernels import low_rank_matmul

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SAVEABLE = ("lm_head", "embed_tokens")
ALL_LINEAR = "all-linear"


class LoRAParam(nnx.Param):
    """A factor of a low-rank update: trained, kept in float32."""


class LoRA(nnx.Module):
    """x -> s (drop(x) A) B, with A [..., in, r], B [..., r, out], s [...]: one per layer of the stack."""

    def __init__(self, a: jax.Array, b: jax.Array, scale: jax.Array, dropout: float) -> None:
        self.a = LoRAParam(a)
        self.b = LoRAParam(b)
        self.scale = Frozen(scale)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "... in"], dropout_key: jax.Array | None = None) -> Float[Array, "... out"]:
        if self.dropout and dropout_key is not None:
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        return low_rank_matmul(x, self.a[...], self.b[...], self.scale[...])


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """PEFT's options by PEFT's names. `target_modules`: names, a regular expression of whole ones, or "all-linear"."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    random_state: int = 3407

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise UserError(
                f"LoRA rank r={reprlib.repr(self.r)} must be a whole number of at least 1, get_peft_model(model, r=16, ...)."
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout!r} must be at least 0 and below 1.")
        if self.bias != "none":
            raise UserError(f"bias={self.bias!r} is not supported; only 'none' (biases stay frozen) is.")
        unknown = sorted(set(self.modules_to_save) - set(SAVEABLE))
        if unknown:
            raise UserError(f"modules_to_save names {', '.join(unknown)}; it can hold {', '.join(SAVEABLE)}.")

    @property
    def scale(self) -> float:
        """s of the module docstring."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def create(
        cls,
        *,
        target_modules: Sequence[str] | str | None = None,
        layers_to_transform: Sequence[int] | int | None = None,
        modules_to_save: Sequence[str] | None = None,
        **options: object,
    ) -> "LoraConfig":
        """From what PEFT accepts: lists where this holds tuples, one layer index, None."""
        layers = (layers_to_transform,) if isinstance(layers_to_transform, int) else layers_to_transform
        if target_modules is None:
            target_modules = ALL_LINEAR
        return cls(
            target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
            layers_to_transform=None if layers is None else tuple(layers),
            modules_to_save=tuple(modules_to_save or ()),
            **options,  # pyright: ignore[reportArgumentType]
        )


def _full_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.{projection}"


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def select_targets(lora: LoraConfig, num_layers: int) -> dict[str, tuple[bool, ...]]:
    """The projections LoRA goes on, each with a flag per layer. A name or layer that matches nothing is an error."""
    names = {p: [_full_name(layer, p) for layer in range(num_layers)] for p in PROJECTIONS}
    valid = f"valid names are {', '.join(p.split('.')[-1] for p in PROJECTIONS)}, or {ALL_LINEAR!r}"
    targets = lora.target_modules
    if targets == ALL_LINEAR:
        chosen = {p: [True] * num_layers for p in PROJECTIONS}
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"target_modules={targets!r} is not a regular expression ({error}); {valid}.") from error
        chosen = {p: [pattern.fullmatch(name) is not None for name in names[p]] for p in PROJECTIONS}
        if not any(any(flags) for flags in chosen.values()):
            raise UserError(
                f"target_modules={targets!r} matches no whole name such as {names[PROJECTIONS[0]][0]!r}; {valid}."
            )
    else:
        every = [name for group in names.values() for name in group]
        bad = [target for target in targets if not any(_matches(name, target) for name in every)]
        if bad or not targets:
            raise UserError(f"target_modules names {', '.join(bad) or 'nothing'}; {valid}.")
        chosen = {p: [any(_matches(name, t) for t in targets) for name in names[p]] for p in PROJECTIONS}
    if lora.layers_to_transform is not None:
        outside = [layer for layer in lora.layers_to_transform if not 0 <= layer < num_layers]
        if outside or not lora.layers_to_transform:
            raise UserError(
                f"layers_to_transform={list(lora.layers_to_transform)} must hold layers of 0..{num_layers - 1}."
            )
        chosen = {
            p: [flag and layer in lora.layers_to_transform for layer, flag in enumerate(flags)]
            for p, flags in chosen.items()
        }
    return {p: tuple(flags) for p, flags in chosen.items() if any(flags)}


def find_linear(model: Llama, projection: str) -> Linear:
    """The (stacked) linear at a path such as "self_attn.q_proj"."""
    module = model.layers
    for part in projection.split("."):
        module = getattr(module, part)
    assert isinstance(module, Linear)
    return module


def _weight_shape(linear: Linear) -> tuple[int, int, int]:
    """(layers, out, in) of a stacked linear, packed or not."""
    layers, out, into = linear.weight.get_value().shape
    return layers, out, into


def _init_factors(linear: Linear, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    layers, out, into = _weight_shape(linear)
    if rank > min(out, into):
        raise UserError(f"LoRA rank r={rank} exceeds the smallest side of a targeted weight [{out}, {into}]; lower r.")
    bound = 1 / math.sqrt(into)
    a = jax.random.uniform(key, (layers, into, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((layers, rank, out), jnp.float32)


def add_lora(model: Llama, lora: LoraConfig) -> None:
    """Freeze the model in place, attach LoRA to its targets, and make `modules_to_save` trainable in float32."""
    targets = select_targets(lora, model.config.num_layers)
    if any(find_linear(model, projection).lora is not None for projection in PROJECTIONS):
        raise UserError("the model already carries LoRA; load the base model anew to attach another.")
    freeze(model)
    keys = jax.random.split(jax.random.key(lora.random_state), len(targets))
    for (projection, flags), key in zip(targets.items(), keys, strict=True):
        linear = find_linear(model, projection)
        a, b = _init_factors(linear, lora.r, key)
        linear.lora = LoRA(a, b, jnp.where(jnp.array(flags), jnp.float32(lora.scale), 0.0), lora.lora_dropout)
    for name in lora.modules_to_save:
        unfreeze_module(model, name)


def unfreeze_module(model: Llama, name: str) -> None:
    """Give `lm_head` or `embed_tokens` a float32 weight of its own to train; tied ones come apart, as in PEFT."""
    if model.lm_head is None:
        # a plain reference to the same array: nothing is copied until one of the two is trained
        model.lm_head = Linear({"lm_head.weight": model.embed_tokens.weight[...]}, "lm_head", Frozen)
    module = getattr(model, name)
    module.weight = nnx.Param(jnp.array(module.weight[...], jnp.float32))


def freeze(model: Llama) -> None:
    """Turn every parameter into a `Frozen` one, in the compute dtype (training all of them keeps float32)."""
    for _, module in nnx.iter_modules(model):
        for field in ("weight", "bias"):
            parameter = getattr(module, field, None)
            if isinstance(parameter, nnx.Param):
                setattr(module, field, Frozen(parameter[...].astype(model.dtype)))


def lora_modules(model: Llama) -> dict[str, LoRA]:
    """The attached LoRA by projection."""
    found = {projection: find_linear(model, projection).lora for projection in PROJECTIONS}
    return {projection: lora for projection, lora in found.items() if lora is not None}


def merged_weight(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """W + s (A B)^T in float32, of one layer: weight [out, in], a [in, r], b [r, out]."""
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).T
    return weight.astype(jnp.float32) + scale * delta


def trainable_parameters(model: nnx.Module) -> int:
    """How many numbers training changes; LoRA on layers left out does not count."""
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    for _, lora in nnx.iter_modules(model):
        if isinstance(lora, LoRA):
            left_out = int((lora.scale[...] == 0).sum())
            total -= left_out * (lora.a[...].size + lora.b[...].size) // lora.scale[...].size
    return total
