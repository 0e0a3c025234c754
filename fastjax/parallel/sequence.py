"""A row of tokens divided over the devices of a mesh axis, so that a causal pass is the same work for each of them.

Of n devices, device i holds chunks i and 2n-1-i of 2n equal ones: an early one that sees little and a late one that sees
much. What is small, a batch's integers, lies whole on every device; each takes its own part of them inside shard_map.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

ROWS = 8  # a chunk is a multiple of it, as the tiles of the attention kernels want


def part_length(length: int, devices: int) -> int:
    """Positions of a row on each device, those that fill it up included."""
    return -(-length // (2 * devices * ROWS)) * 2 * ROWS


@dataclass(frozen=True)
class SequenceSplit:
    """The division over one mesh axis; its methods are called inside shard_map."""

    axis: str

    @property
    def devices(self) -> int:
        return jax.lax.axis_size(self.axis)

    def chunks(self, x: Shaped[Array, "B S"], fill: int = 0) -> Shaped[Array, "2n B C"]:
        """A row's chunks in order; `fill` at its end makes them equal."""
        rows, length = x.shape
        missing = part_length(length, self.devices) * self.devices - length
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
        return x.reshape(rows, 2 * self.devices, -1).swapaxes(0, 1)

    def own(self, x: Shaped[Array, "B S"], fill: int = 0) -> Shaped[Array, "B S/n"]:
        """This device's chunks of each row, the early one first."""
        chunks, device = self.chunks(x, fill), jax.lax.axis_index(self.axis)
        return jnp.concatenate([chunks[device], chunks[2 * self.devices - 1 - device]], axis=1)

    def visitors(self) -> Int[Array, "n-1"]:
        """Whose chunks come by at each step around the ring, those of the device before this one first."""
        return (jax.lax.axis_index(self.axis) - jnp.arange(1, self.devices)) % self.devices

    def sent_on(self, x: Array) -> Array:
        """What the device before this one holds, as each sends its own to the next."""
        around = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.lax.ppermute(x, self.axis, around)
