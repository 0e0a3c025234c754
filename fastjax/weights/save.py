"""Full models out: HF safetensors, split into files of bounded size, with an index where there are several.

Each tensor is made when its turn comes and written at once, so that the host holds one at a time however large the
model. That takes knowing every shape and dtype beforehand: hence `ExportTensor`, a declaration with a function to call.
The whole save appears in one go (see `staging`).
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastjax.models import ParamSpec
from fastjax.parallel.hosts import to_host
from fastjax.weights.checkpoint import INDEX_NAME, SINGLE_NAME
from fastjax.weights.errors import duplicates, listing
from fastjax.weights.safetensors_file import make_header
from fastjax.weights.staging import staged_directory
from pallas_kernels import NF4Array, dequantize_nf4

MAX_SHARD_BYTES = 5 * 10**9
TORCH_METADATA = {"format": "pt"}  # transformers wants to know which framework's layout a file has
WEIGHT_FILES = (SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors")


@dataclasses.dataclass(frozen=True)
class ExportTensor:
    """A tensor to be written under a HF name; `read` makes its values when they are needed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "ExportTensor":
        """One whose values are at hand."""
        return cls(name, array.shape, array.dtype, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_tensors(
    weights: Mapping[str, jax.Array | NF4Array], specs: Mapping[str, ParamSpec], *, dtype: Any = jnp.bfloat16
) -> Iterator[ExportTensor]:
    """The model's tensors under their HF names: stacks taken apart layer by layer, packed weights dequantised."""
    if weights.keys() != specs.keys():
        differing = sorted(weights.keys() ^ specs.keys())
        raise ValueError(f"weights and specs differ in {listing(differing)}; export exactly the declared parameters.")
    dtype = jnp.dtype(dtype)
    for key, spec in specs.items():
        weight = weights[key]
        if weight.shape != spec.stacked_shape:
            raise ValueError(
                f"weight {key} has shape {weight.shape}, where {spec.stacked_shape} is declared; reshape it."
            )
        for layer, name in enumerate(spec.hf_names()):
            index = None if spec.layers is None else np.int32(layer)
            yield ExportTensor(name, spec.shape, np.dtype(dtype), partial(_read_weight, weight, index, dtype))


def _read_weight(weight: jax.Array | NF4Array, layer: np.int32 | None, dtype: jnp.dtype) -> np.ndarray:
    return to_host(_dense_layer(weight, layer, dtype=dtype))


@partial(jax.jit, static_argnames="dtype")
def _dense_layer(weight: jax.Array | NF4Array, layer: jax.Array | None, *, dtype: jnp.dtype) -> jax.Array:
    if layer is not None:
        weight = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), weight)
    return dequantize_nf4(weight, dtype) if isinstance(weight, NF4Array) else weight.astype(dtype)


def save_weights(
    directory: str | Path,
    tensors: Iterable[ExportTensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = TORCH_METADATA,
) -> None:
    """Write `model.safetensors`, or numbered files of at most `max_shard_bytes` and their index, into `directory`.

    Weights that an earlier save left there are removed; other files are not touched. A tensor larger than
    `max_shard_bytes` gets a file to itself.
    """
    with staged_directory(directory, replaces=WEIGHT_FILES) as staging:
        write_weights(staging, tensors, max_shard_bytes=max_shard_bytes, metadata=metadata)


def write_weights(
    directory: Path,
    tensors: Iterable[ExportTensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = TORCH_METADATA,
) -> None:
    """The files of `save_weights`, into a directory that is staged already."""
    shards = plan_shards(list(tensors), max_shard_bytes)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, metadata)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(tensors: list[ExportTensor], max_shard_bytes: int) -> list[list[ExportTensor]]:
    """Consecutive tensors to a file, as many as fit."""
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be at least 1 byte; 5 GB is usual.")
    if not tensors:
        raise ValueError("there are no tensors to save; give at least one.")
    if twice := duplicates(tensor.name for tensor in tensors):
        raise ValueError(f"tensors {listing(twice)} are to be saved more than once; give each name once.")
    shards: list[list[ExportTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def in_file_order(tensors: Iterable[ExportTensor]) -> list[ExportTensor]:
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def read_along(tensors: Iterable[ExportTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """What the other processes do while one is in `save_weights`: a tensor that is split over them takes all to be read."""
    for shard in plan_shards(list(tensors), max_shard_bytes):
        for tensor in in_file_order(shard):
            tensor.read()


def write_safetensors(
    path: Path, tensors: Iterable[ExportTensor], metadata: Mapping[str, str] = TORCH_METADATA
) -> None:
    """One file, tensor by tensor. Wider dtypes come first, which keeps every tensor aligned to its own."""
    tensors = in_file_order(tensors)
    header = make_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], dict(metadata))
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            values = tensor.read()
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(
                    f"tensor {tensor.name} came as {values.dtype} {list(values.shape)}, where {tensor.dtype} "
                    f"{list(tensor.shape)} was declared; declare what is written."
                )
            # bytes, because ml_dtypes' bfloat16 has no buffer protocol
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
