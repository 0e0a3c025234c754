"""A stored tensor on its way to the devices, in pieces of bounded size.

A device's share of a tensor is a rectangle: a run of rows, and all or some of the columns. Rows are what lies together
in a file, so a share is read and sent some rows at a time, and put together on its device in a buffer that each write
donates. The host then holds a few pieces (two being sent, the next ones being read), not two tensors, of which an
embedding alone may take gigabytes; and it reads no rows that none of its own devices keep.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fastjax.weights.safetensors_file import TensorInfo

PIECE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows [start, stop) of a tensor and what `columns` selects of each, kept by one device (None is JAX's default)."""

    device: Any
    start: int
    stop: int
    columns: tuple[slice, ...]


def shares_of(shape: tuple[int, ...], sharding: NamedSharding | None) -> list[Share]:
    """The shares of this process's devices."""
    if sharding is None:
        return [Share(None, 0, shape[0], ())]
    indices = sharding.addressable_devices_indices_map(shape)
    shares = []
    for device, index in indices.items():
        assert index is not None  # as it is only for devices of other processes
        rows, *columns = index
        start, stop, _ = rows.indices(shape[0])
        shares.append(Share(device, start, stop, tuple(columns)))
    return shares


def pieces_of(info: TensorInfo, sharding: NamedSharding | None) -> list[tuple[int, int]]:
    """The runs of rows to be read, each once: at most PIECE_BYTES (or one row) each, all in the same shares."""
    ranges = sorted({(share.start, share.stop) for share in shares_of(info.shape, sharding)})
    step = max(1, PIECE_BYTES * info.shape[0] // max(1, info.nbytes))
    return [(row, min(row + step, stop)) for start, stop in ranges for row in range(start, stop, step)]


class Landing:
    """Gathers a tensor's pieces on the devices."""

    def __init__(self, info: TensorInfo, sharding: NamedSharding | None) -> None:
        self.info = info
        self.sharding = sharding
        self.buffers: dict[Share, jax.Array] = {}
        self.sent: list[jax.Array] = []  # the latest rows, perhaps still on their way

    def add(self, start: int, block: np.ndarray) -> None:
        """Send rows from `start` on to the devices that keep them; returns when the rows sent before have arrived."""
        before, self.sent = self.sent, []
        for share in shares_of(self.info.shape, self.sharding):
            if share.start <= start < share.stop:
                part = jax.device_put(block[:, *share.columns], share.device)
                self.sent.append(part)
                if len(block) < share.stop - share.start:
                    part = _write_rows(self._buffer(share, part), part, np.int32(start - share.start))
                self.buffers[share] = part
        jax.block_until_ready(before)

    def _buffer(self, share: Share, part: jax.Array) -> jax.Array:
        if share in self.buffers:
            return self.buffers[share]
        return jnp.zeros((share.stop - share.start, *part.shape[1:]), part.dtype, device=share.device)

    def take(self) -> jax.Array:
        """The whole tensor, once every piece is there."""
        arrays = list(self.buffers.values())
        self.buffers.clear()
        self.sent.clear()
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.info.shape, self.sharding, arrays)


@partial(jax.jit, donate_argnums=0)
def _write_rows(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, 0)
