"""One answer for all processes to a question that only some of them can answer: was a signal received?

A scheduler may send its signal to one process, or to all at different steps; what follows, a checkpoint and the end of the
run, takes every process at the same step. So each step carries every process's vote in a small collective, dispatched
behind the step and read `lag` steps later, when it has long been computed: nothing waits, and all read the same number.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest of all processes' votes, whole numbers, a few steps after they were cast; with one process, at once."""

    def __init__(self, mesh: Mesh | None, lag: int) -> None:
        self.lag = lag
        self.pending: collections.deque[jax.Array] = collections.deque()
        self.largest = 0
        if mesh is not None and jax.process_count() > 1:
            self.split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self.reduce = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        else:
            self.split = None

    def vote(self, own: int) -> int:
        """Casts this process's vote of a step; the largest of those read by now."""
        if self.split is None:
            self.largest = max(self.largest, own)
            return self.largest
        shape = (self.split.mesh.size,)
        votes = jax.make_array_from_callback(shape, self.split, lambda index: np.full((1,), own, np.int32))
        self.pending.append(self.reduce(votes))
        if len(self.pending) > self.lag:
            self.largest = max(self.largest, int(self.pending.popleft()))
        return self.largest
