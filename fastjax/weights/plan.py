"""Which stored tensor becomes which parameter: decided, and everything checked, before any weight is read.

A parameter's tensors are stored either plain (16 or 32 bits) or packed, as bitsandbytes saves NF4: `X.weight` then
holds bytes, and `X.weight.absmax`, `X.weight.quant_map`, ... beside it the rest. In a checkpoint with packed tensors
the plain ones were left plain on purpose, and stay so.
"""

import dataclasses
import re
from collections.abc import Mapping

from fastjax.models import ParamSpec
from fastjax.weights.errors import (
    MissingTensorsError,
    QuantizedCheckpointError,
    SurplusTensorsError,
    TensorDtypeError,
    TensorShapeError,
    listing,
)
from fastjax.weights.safetensors_file import TensorInfo, read_rows

PLAIN_DTYPES = ("BF16", "F16", "F32")
PACKED_PARTS = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")
HARMLESS = re.compile(r"\brotary_emb\.inv_freq$")  # derived from the config; old versions of transformers saved it
FOREIGN = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_scale|weight_scale_inv|weight_packed|weight_format)$")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """A stored tensor and the parameter, or layer of one, that it becomes."""

    key: str
    spec: ParamSpec
    layer: int | None
    info: TensorInfo
    parts: tuple[TensorInfo, ...]  # what lies beside a packed tensor; empty for a plain one

    @property
    def nbytes(self) -> int:
        return self.info.nbytes + sum(part.nbytes for part in self.parts)


def plan_sources(tensors: Mapping[str, TensorInfo], specs: Mapping[str, ParamSpec]) -> list[Source]:
    """A source for every parameter and layer, in the order in which they lie in the files."""
    parts = _packed_parts(tensors)
    _check_names(tensors, specs, {part.name for group in parts.values() for part in group})
    sources = []
    for key, spec in specs.items():
        for layer, name in enumerate(spec.hf_names()):
            index = None if spec.layers is None else layer
            sources.append(Source(key, spec, index, tensors[name], tuple(parts.get(name, ()))))
    for source in sources:
        _check_tensor(source)
    return sorted(sources, key=lambda source: (source.info.path, source.info.offset))


def quantized_keys(sources: list[Source], load_in_4bit: bool) -> set[str]:
    """The parameters to be kept packed."""
    if not load_in_4bit:
        return set()
    packed = [source for source in sources if source.parts]
    if not packed:
        return {source.key for source in sources if source.spec.quantize}
    keys = {source.key for source in packed if source.spec.quantize}
    for source in sources:
        if source.key in keys and not source.parts:
            raise QuantizedCheckpointError(
                f"tensor {source.info.name} is stored plain, while other layers' {source.key} are stored in 4 bits; "
                "layers are kept stacked, so load with load_in_4bit=False or from a checkpoint that is not mixed."
            )
    return keys


def _packed_parts(tensors: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """The parts beside each packed tensor, by its name."""
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        match = PACKED_PARTS.search(name)
        if match and name[: match.start()] in tensors:
            groups.setdefault(name[: match.start()], []).append(info)
    return groups


def _check_names(tensors: Mapping[str, TensorInfo], specs: Mapping[str, ParamSpec], parts: set[str]) -> None:
    expected = [name for spec in specs.values() for name in spec.hf_names()]
    foreign = sorted(name for name in tensors if FOREIGN.search(name))
    if foreign:
        raise QuantizedCheckpointError(
            f"the checkpoint is quantised in a way that is not supported (it holds {listing(foreign)}); load the "
            "16-bit one, or one that bitsandbytes packed to NF4."
        )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise MissingTensorsError(
            f"the checkpoint lacks {len(missing)} of the {len(expected)} tensors that config.json asks for: "
            f"{listing(missing)}; complete the files or correct config.json."
        )
    surplus = sorted(name for name in tensors.keys() - set(expected) - parts if not HARMLESS.search(name))
    if HEAD in surplus and EMBEDDING in expected:
        _check_tied(tensors[HEAD], tensors[EMBEDDING])
        surplus.remove(HEAD)
    if surplus:
        raise SurplusTensorsError(
            f"the checkpoint holds {len(surplus)} tensors that the model in config.json has no place for: "
            f"{listing(surplus)}; correct config.json or remove them."
        )


def _check_tied(head: TensorInfo, embedding: TensorInfo) -> None:
    """A tied model's checkpoint may store the shared weight twice, but not two different weights."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    rows = head.shape[0] if head.shape else 0
    step = max(1, COMPARED_BYTES * rows // max(1, head.nbytes))
    for start in range(0, rows if same else 0, step):
        stop = min(start + step, rows)
        same = same and read_rows(head, start, stop).tobytes() == read_rows(embedding, start, stop).tobytes()
    if not same:
        raise SurplusTensorsError(
            f"the checkpoint holds a {HEAD} that differs from {EMBEDDING}, though config.json says that the two are "
            "tied; set tie_word_embeddings to false to load both, or remove it."
        )


def _check_tensor(source: Source) -> None:
    info, spec = source.info, source.spec
    if source.parts:  # a packed tensor's shape is in its quant_state, and checked on import
        return
    if info.dtype not in PLAIN_DTYPES:
        raise TensorDtypeError(
            f"tensor {info.name} in {info.path} has dtype {info.dtype}, where a weight has one of "
            f"{', '.join(PLAIN_DTYPES)}; convert it."
        )
    if info.shape != spec.shape:
        raise TensorShapeError(
            f"tensor {info.name} in {info.path} has shape {list(info.shape)}, where config.json asks for "
            f"{list(spec.shape)}; correct the one that is wrong."
        )
