"""What can be wrong with a checkpoint: one class per kind of fault, so that callers and tests can tell them apart.

Every message is one sentence that names the file or tensor at fault, what was expected and what to do.
"""

from collections import Counter
from collections.abc import Iterable

from fastjax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not hold the model it should."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A directory, a hub id or a file that is not there."""


class PickleCheckpointError(CheckpointError):
    """Weights stored only as pickles, which are never loaded."""


class JsonFileError(CheckpointError):
    """A config.json or an index that is not a JSON object."""


class IndexFileError(CheckpointError):
    """An index that disagrees with the files it names."""


class OutsidePathError(CheckpointError):
    """An index that names a file outside its own directory."""


class TruncatedFileError(CheckpointError):
    """A safetensors file shorter than its header says."""


class CorruptHeaderError(CheckpointError):
    """A safetensors header that contradicts itself or the file."""


class TensorDtypeError(CheckpointError):
    """A tensor of a dtype that is unknown, or of no use as a weight."""


class DuplicateTensorError(CheckpointError):
    """A tensor stored twice."""


class MissingTensorsError(CheckpointError):
    """Tensors of the model that the checkpoint lacks."""


class SurplusTensorsError(CheckpointError):
    """Tensors of the checkpoint that the model has no place for."""


class TensorShapeError(CheckpointError):
    """A tensor of another shape than the model's."""


class NonFiniteWeightError(CheckpointError):
    """NaN or Inf in a weight."""


class QuantizedCheckpointError(CheckpointError):
    """A checkpoint quantised in a way that cannot be loaded as asked."""


class UnevenShardingError(CheckpointError):
    """A weight that the mesh cannot split into equal parts."""


def duplicates(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def listing(names: list[str], shown: int = 3) -> str:
    """The first few of many names: "a, b, c and 7 more"."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
