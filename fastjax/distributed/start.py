"""Joining the other processes of a run, and leaving them.

JAX's distributed runtime has a coordinator in process 0 that all connect to. It notices a process that has died, by its
silence, and ends the rest: within HEARTBEAT_S, so that a job frees its machines soon whatever started it.
"""

import os
import sys
import threading

import jax

from fastjax.distributed.cluster import Membership
from fastjax.errors import UserError

HEARTBEAT_S = 40
PATIENCE_S = 20  # before it is said what is waited for: JAX gives up after minutes, with little to say


def join(membership: Membership | None) -> None:
    """Connects to the coordinator and waits for all processes; before anything else is asked of JAX."""
    if membership is None:
        return
    # its handler of SIGTERM would take the place of ours, which saves a checkpoint (fastjax.train.interrupts)
    jax.config.update("jax_enable_preemption_service", False)
    where = membership.coordinator or f"found by way of {membership.method!r}"
    waiting = f"fastjax: still waiting for the other processes (coordinator {where})"
    slow = threading.Timer(PATIENCE_S, print, [waiting], {"file": sys.stderr})
    slow.daemon = True
    slow.start()
    try:
        jax.distributed.initialize(
            coordinator_address=membership.coordinator,
            coordinator_bind_address=listening_address(membership.coordinator),
            num_processes=membership.processes,
            process_id=membership.process,
            cluster_detection_method=membership.method,
            local_device_ids=[] if membership.all_devices else None,  # [] restricts nothing, None to one device
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"this process could not join the others (coordinator {where}): {str(error).splitlines()[0]}"
        ) from error
    finally:
        slow.cancel()


def listening_address(coordinator: str | None) -> str | None:
    """Where the coordinator listens: processes of one machine need no door to the network. None: on every address."""
    return coordinator if (coordinator or "").rpartition(":")[0] in ("127.0.0.1", "localhost") else None


def name_of_this() -> str:
    """What tells this process from others in a message; nothing where it is alone."""
    return f"process {jax.process_index()} of {jax.process_count()}: " if jax.distributed.is_initialized() else ""


def leave_at_once(code: int) -> None:
    """Ends a process that has failed, if there are others; alone it goes on to end as any program does.

    An orderly exit waits for the others, and these are waiting in a collective for the one that failed.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
