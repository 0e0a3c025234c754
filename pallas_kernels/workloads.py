"""Named shapes that kernels are tested, measured and tuned on: model/part/size, such as llama3.1-8b/gate_up/16384.

A part is a matrix of a decoder layer (qkv, o, gate, gate_up, down), with a number of tokens a product with it; or
`attention`, whose size is rows x length, or rows x documents x length where documents are packed; or `head`, the loss
over so many tokens.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def matrices(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Heights and width of a layer's weights; q, k, v and gate, up one below the other, one product in a step."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": ((query, key, key), self.hidden),
            "o": ((self.hidden,), query),
            "gate": ((self.intermediate,), self.hidden),
            "gate_up": ((self.intermediate,) * 2, self.hidden),
            "down": ((self.hidden,), self.intermediate),
        }


MODELS = {
    "llama3.1-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "tiny": Model(256, 512, 4, 2, 64, 4096),
}


@dataclass(frozen=True)
class Product:
    """x [tokens, width] times the transpose of weights of these heights, one below the other."""

    name: str
    tokens: int
    heights: tuple[int, ...]
    width: int

    @property
    def out(self) -> int:
        return sum(self.heights)

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.out * self.width


@dataclass(frozen=True)
class Attention:
    """Rows of `documents` packed documents each, causal; `lengths` says how long each row's are, where they differ."""

    name: str
    rows: int
    documents: int
    length: int  # of a document
    heads: int
    kv_heads: int
    depth: int
    lengths: tuple[tuple[int, ...], ...] = ()

    @property
    def row_length(self) -> int:
        return sum(self.document_lengths[0])

    @property
    def flops(self) -> int:
        """Of the forward pass: two products over the pairs that a causal order leaves."""
        return 2 * self.heads * self.depth * sum(length**2 for row in self.document_lengths for length in row)

    @property
    def document_lengths(self) -> tuple[tuple[int, ...], ...]:
        return self.lengths or ((self.length,) * self.documents,) * self.rows

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [rows, row_length]"""
        ids = [np.repeat(np.arange(1, 1 + len(row)), row) for row in self.document_lengths]
        return np.stack(ids).astype(np.int32)


@dataclass(frozen=True)
class Head:
    """hidden [tokens, width] and a head of so many words."""

    name: str
    tokens: int
    width: int
    words: int


Workload = Product | Attention | Head
LAYER = ("qkv", "o", "gate_up", "down")  # the products of a layer
PRODUCTS = tuple(f"llama3.1-8b/{part}/{tokens}" for part in LAYER for tokens in (256, 4096, 16384))
ATTENTIONS = tuple(f"llama3.1-8b/attention/{size}" for size in ("8x2048", "1x8192", "1x32768"))
PACKED = "llama3.1-8b/attention/1x8x1024"
LOGNORMAL = "llama3.1-8b/attention/4x8192"  # of lognormal_attention
HEAD = "llama3.1-8b/head/8192"


def workload(name: str) -> Workload:
    """The shape a name stands for, or ValueError."""
    model_name, _, rest = name.partition("/")
    part, _, size = rest.partition("/")
    model, sizes = MODELS.get(model_name), size.split("x")
    parts = [] if model is None else [*model.matrices, "attention", "head"]
    counts = (2, 3) if part == "attention" else (1,)
    positive = all(each.isdecimal() and int(each) > 0 for each in sizes)
    if model is None or part not in parts or len(sizes) not in counts or not positive:
        models, known = (
            ", ".join(MODELS),
            ", ".join(parts or ("qkv", "o", "gate", "gate_up", "down", "attention", "head")),
        )
        raise ValueError(
            f"no workload {name!r}: MODEL/PART/SIZE with a model of {models}, a part of {known}, and a size such as 4096 "
            "(tokens), or of attention 8x2048 (rows x length) or 1x8x1024 (rows x documents x length)."
        )
    numbers = [int(each) for each in sizes]
    if part == "attention":
        rows, documents, length = numbers if len(numbers) == 3 else (numbers[0], 1, numbers[1])
        return Attention(name, rows, documents, length, model.heads, model.kv_heads, model.head_dim)
    if part == "head":
        return Head(name, numbers[0], model.hidden, model.vocabulary)
    return Product(name, numbers[0], *model.matrices[part])


def product(name: str) -> Product:
    shape = workload(name)
    if not isinstance(shape, Product):
        raise ValueError(f"workload {name!r} is no product with a layer's weight.")
    return shape


def attention(name: str) -> Attention:
    shape = workload(name)
    if not isinstance(shape, Attention):
        raise ValueError(f"workload {name!r} is no attention.")
    return shape


def lognormal_attention(name: str, seed: int = 0) -> Attention:
    """Rows of that length, filled with documents of lognormal lengths."""
    shape, generator = attention(name), np.random.default_rng(seed)
    lengths = tuple(tuple(packed_lengths(generator, shape.row_length).tolist()) for _ in range(shape.rows))
    return replace(shape, name=f"{name} lognormal", lengths=lengths)


def packed_lengths(generator: np.random.Generator, length: int, mean: float = 600, sigma: float = 1) -> np.ndarray:
    """Of documents that fill a row, the last one cut."""
    drawn = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, length).astype(int).clip(1)
    ends = np.minimum(np.cumsum(drawn), length)
    return np.diff(np.unique(ends), prepend=0)


def head(name: str) -> Head:
    shape = workload(name)
    if not isinstance(shape, Head):
        raise ValueError(f"workload {name!r} is no head.")
    return shape
