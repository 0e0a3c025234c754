"""A HF checkpoint in: tensor by tensor from the files to the devices, quantised there as it comes.

Names, shapes and dtypes are checked first, from the files' headers (`plan`). Then each tensor is read and sent piece
by piece (`transfer`), packed and written into its parameter (`placement`), while threads read the next pieces. With a
mesh each device is sent its share alone.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fastjax.models import ParamSpec
from fastjax.weights.bnb import nf4_from_bnb
from fastjax.weights.checkpoint import find_tensors
from fastjax.weights.errors import NonFiniteWeightError, QuantizedCheckpointError, TensorShapeError
from fastjax.weights.placement import Target, Weight, allocate, fits, make_target, place_packed, store
from fastjax.weights.plan import Source, plan_sources, quantized_keys
from fastjax.weights.safetensors_file import read_rows
from fastjax.weights.transfer import Landing, pieces_of
from pallas_kernels import NF4Array

DTYPES = ("bfloat16", "float16", "float32")
READERS = 4  # threads: one alone copies out of the page cache slower than a GPU takes it


def load_weights(
    directory: str | Path,
    specs: Mapping[str, ParamSpec],
    *,
    load_in_4bit: bool,
    dtype: Any,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> dict[str, Weight]:
    """The parameters that `specs` declares, from the checkpoint in `directory`.

    Args:
        directory: holds model.safetensors, or an index and its files; see `checkpoint`.
        load_in_4bit: quantise what a spec marks so to NF4. What a checkpoint stores packed is kept as it is, value for
            value; without load_in_4bit it is dequantised.
        dtype: bfloat16, float16 or float32: of what is not packed, and of a weight before it is quantised.
        mesh: where to; by default all goes to JAX's default device.
        progress: show a progress bar on stderr.
    """
    if np.dtype(dtype).name not in DTYPES:
        raise ValueError(f"{dtype=} is not one that weights can have; choose from {', '.join(DTYPES)}.")
    sources = plan_sources(find_tensors(Path(directory)), specs)
    packed = quantized_keys(sources, load_in_4bit)
    targets = {key: make_target(spec, quantize=key in packed, dtype=dtype, mesh=mesh) for key, spec in specs.items()}
    weights: dict[str, Weight] = {}
    total = sum(_bytes_read(source, targets[source.key]) for source in sources)
    hidden = not progress or jax.process_index() > 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=hidden) as bar:
        for source, value in _arrivals(sources, targets, bar.update):
            weights[source.key] = _take_in(source, targets[source.key], weights.pop(source.key, None), value)
            del value  # before the next one lands
    return {key: weights[key] for key in specs}


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is read at a time: some rows of a plain tensor, or all parts of a packed one."""

    source: Source
    rows: tuple[int, int]
    last: bool  # of its tensor

    def read(self) -> dict[str, np.ndarray]:
        """Arrays by the names of their tensors."""
        if not self.source.parts:
            return {self.source.info.name: read_rows(self.source.info, *self.rows)}
        return {info.name: read_rows(info) for info in (self.source.info, *self.source.parts)}


def _pieces(source: Source, target: Target) -> list[Piece]:
    rows = [(0, 0)] if source.parts else pieces_of(source.info, target.sharding)
    return [Piece(source, run, last=run == rows[-1]) for run in rows]


def _bytes_read(source: Source, target: Target) -> int:
    """How much of a tensor this process reads: what its own devices keep."""
    if source.parts:
        return source.nbytes
    return (
        source.nbytes
        * sum(stop - start for start, stop in pieces_of(source.info, target.sharding))
        // source.info.shape[0]
    )


def _arrivals(
    sources: Sequence[Source], targets: Mapping[str, Target], report: Callable[[int], Any]
) -> Iterator[tuple[Source, Weight]]:
    """Each stored tensor when all of it has reached the devices."""
    pieces = [piece for source in sources for piece in _pieces(source, targets[source.key])]
    landing = None
    for piece, arrays in zip(pieces, read_ahead([piece.read for piece in pieces]), strict=True):
        source, target = piece.source, targets[piece.source.key]
        report(sum(array.nbytes for array in arrays.values()))
        if source.parts:
            yield source, place_packed(target, _import_packed(source, arrays))
            continue
        landing = landing or Landing(source.info, target.sharding)
        landing.add(piece.rows[0], arrays[source.info.name])
        if piece.last:
            yield source, landing.take()
            landing = None


def read_ahead[T](jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """The result of each job in turn, while threads are at the next READERS ones."""
    pending: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(READERS) as pool:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _import_packed(source: Source, arrays: Mapping[str, np.ndarray]) -> NF4Array:
    packed = nf4_from_bnb(arrays, source.info.name)
    if packed.shape != source.spec.shape:
        raise TensorShapeError(
            f"packed tensor {source.info.name} in {source.info.path} has shape {list(packed.shape)}, where config.json "
            f"asks for {list(source.spec.shape)}; correct the one that is wrong."
        )
    return packed


def _take_in(source: Source, target: Target, stack: Weight | None, value: Weight) -> Weight:
    """The parameter with a tensor in it; returns when the devices are done with that."""
    if stack is None and source.layer is not None:
        stack = allocate(target, value)
    elif isinstance(value, NF4Array) and stack is not None and not fits(target, stack, value):
        raise QuantizedCheckpointError(
            f"packed tensor {source.info.name} in {source.info.path} is not packed as other layers' {source.key} are "
            "(doubly or singly quantised, or by another nested_quant_map); save all layers alike."
        )
    kept, (finite, representable) = store(target, stack, value, source.layer)
    where = f"tensor {source.info.name} in {source.info.path}"
    if not finite:
        raise NonFiniteWeightError(f"{where} holds NaN or Inf; use a checkpoint whose weights are all finite numbers.")
    if not representable:
        raise NonFiniteWeightError(f"{where} holds values too large for {target.dtype}; load it with dtype='bfloat16'.")
    return kept
