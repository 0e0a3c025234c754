"""Who writes, and waiting for each other.

Every process of a run does the same work in the same order, since each collective takes them all. Files are one process's
affair, the first's; what the others must find there they wait for. The waits go through the coordinator, not through
the devices: they may take as long as tokenising a large data set does, and a process that dies ends them.
"""

import jax

PROCESSES = "processes"  # in a run's output_dir: what its processes keep for themselves
LONGEST_WAIT_S = 24 * 3600


def is_writer() -> bool:
    """Whether this process writes logs, metrics, exports: the first one, or the only one."""
    return jax.process_index() == 0


def wait_for_all(what: str, seconds: float = LONGEST_WAIT_S) -> None:
    """Until every process has come to this point, named alike in all of them; an error if one does not in so many seconds."""
    if jax.process_count() > 1:
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        get_barrier_sync_fn()(key=what, timeout_ms=int(1000 * seconds))
