"""The memory there is for a step: on a device, and on its host for what the device offloads.

All processes of a run compile one program, and what it keeps of each layer follows from this room. Two that counted
differently, a host of a page more or a GPU of another kind, would wait for each other for ever in different collectives:
each device's process says what it has, and all take the smallest. Half of a host's memory is divided among the devices
there, of whichever process; what XLA pins it pins for each process, hence divided among its own.
"""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import NAMESPACE_DNS, uuid5

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastjax.parallel.hosts import to_host

PINNED = 64 * 2**30  # host memory that XLA pins at most for a process; it does so in powers of two
PINNABLE = PINNED - PINNED // 16
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one for all containers of a host, another on every other
UNLIMITED = 2**62  # of a device that does not say (the CPU)
DEVICES_OF_A_HOST = 8  # at most, as far as a plan knows of one that is not here


class Room(NamedTuple):
    """Bytes for each device."""

    device: int | None  # None: it does not say
    host: int


class Report(NamedTuple):
    """What the process of a device says of it."""

    machine: int  # a number of its own
    process: int
    device: int  # bytes that this process may use on the smallest of its devices
    host: int  # bytes of the machine's memory


def find_room(mesh: Mesh | None) -> Room:
    """For a device of the mesh, or a single one. All processes of the mesh must ask."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    own = report(devices)
    if mesh is None or not mesh.is_multi_process:
        return shared_room([own] * len(devices))
    row = np.array([own], np.int64).view(np.uint32)  # as bits: JAX has no whole numbers of 64
    split, shape = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), (mesh.size, row.size)
    rows = to_host(jax.make_array_from_callback(shape, split, lambda index: row))
    return shared_room([Report(*map(int, row)) for row in np.ascontiguousarray(rows).view(np.int64)])


def planned_room(devices: int) -> Room:
    """For one of so many devices of a run in a single process a host, on hosts like this one."""
    there = max(jax.local_device_count(), DEVICES_OF_A_HOST)
    return shared_room([report(jax.local_devices())] * min(devices, there))


def report(devices: Sequence[Any]) -> Report:
    stats = [device.memory_stats() or {} for device in devices]
    machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else platform.node()
    return Report(
        machine=uuid5(NAMESPACE_DNS, machine).int >> 65,  # 63 bits
        process=jax.process_index(),
        device=min(each.get("bytes_limit", UNLIMITED) for each in stats),
        host=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def shared_room(reports: Sequence[Report]) -> Room:
    """What each of these devices has; a report of each."""
    of_machine, of_process = (Counter(each[:length] for each in reports) for length in (1, 2))
    host = min(min(each.host // 2 // of_machine[each[:1]], PINNABLE // of_process[each[:2]]) for each in reports)
    device = min(each.device for each in reports)
    return Room(None if device == UNLIMITED else device, host)
