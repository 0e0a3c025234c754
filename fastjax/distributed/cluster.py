"""Which process of a run this is: from flags, or from the environment that SLURM, Open MPI or Kubernetes gave it.

Only whether there is a cluster is decided here, from what its launcher always sets for a process that it started as one of
several. How its processes find each other is JAX's own detection's business, asked for by name, so that no other one
answers. A shell inside an allocation, or a program started without `srun`, is a single process.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping

from fastjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Membership:
    """How `jax.distributed.initialize` is to be called; None means: to be found by `method`."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    method: str = "deactivate"
    all_devices: bool = (
        True  # of this machine, as far as they are visible; else the one with the process's number there
    )


def find_run(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Membership | None:
    """This process's place among those of a run, None if it is alone. Flags go before the environment."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    absent = [name for name, value in given.items() if value is None]
    if processes == 1 and len(absent) == 2:
        return None
    if not absent:
        return from_flags(str(coordinator), int(processes or 0), int(process or 0))
    if len(absent) < len(given):
        raise UserError(f"{' and '.join(absent)} must be given too: the three belong together.")
    return from_slurm(environ) or from_open_mpi(environ) or from_kubernetes(environ)


def from_flags(coordinator: str, processes: int, process: int) -> Membership:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT, where process 0 can be reached.")
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1.")
    if not 0 <= process < processes:
        raise UserError(f"--process {process} must be one of 0 to {processes - 1}, as --processes {processes} says.")
    return Membership(coordinator, processes, process)


def from_slurm(environ: Mapping[str, str]) -> Membership | None:
    """A task of a job step of several, as `srun` starts it."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = number(environ, "SLURM_NTASKS")
    if tasks < 2 or any(name not in environ for name in names):
        return None
    alone = number(environ, "SLURM_STEP_NUM_NODES") == tasks
    return Membership(method="slurm", all_devices=alone or has_own_device(environ))


def from_open_mpi(environ: Mapping[str, str]) -> Membership | None:
    """A rank of several, as `mpirun` starts it."""
    if number(environ, "OMPI_COMM_WORLD_SIZE") < 2:
        return None
    alone = number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    return Membership(method="ompi", all_devices=alone or has_own_device(environ))


def from_kubernetes(environ: Mapping[str, str]) -> Membership | None:
    """A pod of an indexed Job. How many there are, and where the first is, only the cluster's API knows."""
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            f"this is pod {environ['JOB_COMPLETION_INDEX']} of an indexed Kubernetes Job: give --coordinator, --processes and"
            " --process, or pip install 'jax[k8s]' to have them found, or --processes 1 if each pod is a run of its own."
        )
    return Membership(method="k8s")


def has_own_device(environ: Mapping[str, str]) -> bool:
    """Whether the scheduler has left this process a single GPU to see, whose number is then 0 whatever the process's."""
    return len(environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and bool(environ.get("CUDA_VISIBLE_DEVICES"))


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable that holds a number; 0 where there is none."""
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0
