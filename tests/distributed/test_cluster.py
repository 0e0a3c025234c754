"""Which process of a run this is, by flags and by what SLURM, Open MPI and Kubernetes put into the environment."""

import importlib.util
import os
import subprocess
import sys

import pytest

from fastjax.distributed.cluster import Membership, find_run
from fastjax.distributed.launch import free_port
from fastjax.errors import UserError
from fastjax.train.room import PINNABLE

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


def found(**environ: str) -> Membership | None:
    return find_run(None, None, None, environ)


def test_with_neither_it_is_alone():
    assert found() is None
    assert found(SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0") is None  # no srun
    assert found(**SLURM | {"SLURM_NTASKS": "1"}) is None
    assert found(OMPI_COMM_WORLD_SIZE="1") is None
    assert found(KUBERNETES_SERVICE_HOST="10.0.0.1") is None  # a pod of no indexed Job


def test_flags_go_before_the_environment():
    assert find_run("host:1234", 2, 1, SLURM) == Membership("host:1234", 2, 1)
    assert find_run("[::1]:1234", 1, 0, {}) == Membership("[::1]:1234", 1, 0)
    assert find_run(None, 1, None, SLURM) is None
    assert find_run(None, 1, None, KUBERNETES) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", 2, None), "--process must be given too"),
        ((None, 2, None), "--coordinator and --process must be given too"),
        (("host", 2, 0), "'host' must be HOST:PORT"),
        (("host:http", 2, 0), "must be HOST:PORT"),
        (("host:99999", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), "--process 2 must be one of 0 to 1"),
        (("host:1", 0, 0), "--processes 0 must be at least 1"),
    ],
)
def test_flags_that_do_not_make_sense(flags, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        find_run(*flags, {})


def test_slurm():
    assert found(**SLURM) == Membership(method="slurm")  # alone on its node: all GPUs there are its own
    two_on_a_node = SLURM | {"SLURM_NTASKS": "4"}
    assert found(**two_on_a_node) == Membership(method="slurm", all_devices=False)
    assert found(**two_on_a_node, CUDA_VISIBLE_DEVICES="0,1") == Membership(method="slurm", all_devices=False)
    assert found(**two_on_a_node, CUDA_VISIBLE_DEVICES="3") == Membership(method="slurm")  # bound by the scheduler


def test_open_mpi():
    assert found(**OPEN_MPI) == Membership(method="ompi", all_devices=False)
    assert found(**OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == Membership(method="ompi")


def test_kubernetes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert found(**KUBERNETES) == Membership(method="k8s")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pod 3 of an indexed Kubernetes Job: give --coordinator"):
        found(**KUBERNETES)


@pytest.mark.parametrize(
    "environ",
    [
        [SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01"],
        [
            {
                "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": i,
                "OMPI_COMM_WORLD_LOCAL_RANK": i,
            }
            for i in "01"
        ],
    ],
    ids=["slurm", "open mpi"],
)
def test_processes_that_a_launcher_started_find_each_other(environ):
    """As `srun` and `mpirun` set them, with JAX's own detection behind; and divide their machine's memory."""
    code = (
        "import os, jax; from fastjax.distributed.cluster import find_run; from fastjax.distributed.start import join;"
        "from fastjax import make_mesh; from fastjax.train.room import find_room;"
        "join(find_run(None, None, None, os.environ)); room = find_room(make_mesh(data=2));"
        "print(jax.process_index(), jax.process_count(), room.host)"
    )
    usual = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COORDINATOR_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=usual | own, stdout=subprocess.PIPE, text=True)
        for own in environ
    ]
    share = min(PINNABLE, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // 2)
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]  # gloo has its say before
    assert said == [f"0 2 {share}", f"1 2 {share}"]
