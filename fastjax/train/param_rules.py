"""What an optimizer needs to know of a parameter, told from its path in the tree.

The parameters of all layers are stacked, [L, ...], under the name `layers`. Hugging Face keeps them apart, one tensor a
layer, and so do the rules of its optimizers: a matrix is a matrix of one layer, a small tensor is small within a layer.
An index after `layers` (`layers.3.…`) means that this tree is not stacked.
"""

import math
import re
from typing import Any

import jax

KeyPath = tuple[Any, ...]
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|^norm$|_norm$")  # Hugging Face's Trainer spares these
EMBEDDING = "embed_tokens"
HEAD = "lm_head"


def names(path: KeyPath) -> tuple[str, ...]:
    """The names along a path; "a.b" as one key counts as two, and the `.value` of an nnx Variable as none."""
    keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey) or key.name != "value"]
    return tuple(jax.tree_util.keystr(tuple(keys), simple=True, separator=".").split("."))


def is_stacked(path: KeyPath, param: jax.Array) -> bool:
    """Whether axis 0 counts layers: by name, or because a matrix has but two axes."""
    parts = names(path)
    after = parts[parts.index("layers") + 1 :] if "layers" in parts else ()
    return param.ndim > 0 and ((bool(after) and not after[0].isdigit()) or param.ndim > 2)


def layer_shape(path: KeyPath, param: jax.Array) -> tuple[int, ...]:
    """The shape within one layer."""
    return param.shape[1:] if is_stacked(path, param) else param.shape


def layer_size(path: KeyPath, param: jax.Array) -> int:
    """The number of values within one layer."""
    return math.prod(layer_shape(path, param))


def is_embedding(path: KeyPath) -> bool:
    """Whether a parameter belongs to the token embedding, of which a batch touches few rows."""
    return EMBEDDING in names(path)


def is_hidden_matrix(path: KeyPath, param: jax.Array) -> bool:
    """Whether a parameter maps activations to activations: no vector, no embedding, no head."""
    return len(layer_shape(path, param)) == 2 and not {EMBEDDING, HEAD} & set(names(path))


def is_decayed(path: KeyPath, param: jax.Array) -> bool:
    """Whether weight decay applies: to everything but biases and norms."""
    del param
    return not any(UNDECAYED.search(name) for name in names(path))
