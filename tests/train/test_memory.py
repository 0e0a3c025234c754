"""The planner's arithmetic: policies that fit are chosen, and what cannot fit says so; and what it is worth."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from bench.workloads import SHAPES, random_packed_model
from fastjax import make_mesh
from fastjax.errors import UserError
from fastjax.lora import LoraConfig, add_lora
from fastjax.models import Llama
from fastjax.parallel.sequence import part_length
from fastjax.train.memory import StepMemory, step_memory
from fastjax.train.mesh_layout import MeshLayout
from fastjax.train.optimizers import make_optimizer
from fastjax.train.recompute import LONG_ROW, SHARE, choose_runs, fitting_runs
from fastjax.train.room import PINNABLE, UNLIMITED, Report, Room, find_room, planned_room, shared_room

MEMORY = StepMemory(
    layers=4,
    weights=100,
    trained=10,
    optimizer=5,
    gradients=10,
    kept={"none": 50, "full": 5, "offload": 0, "offload_o": 0},
    layer_work=20,
    again_work=40,
    loss_work=30,
    ahead=2,
    host={"none": 0, "full": 0, "offload": 4, "offload_o": 9},
    row=2048,
)
ROOM = 60 * 2**30


@pytest.mark.parametrize(
    ("runs", "peak"),
    [
        ((("none", 4),), 135 + 200 + 30),  # all that is kept, in the loss
        ((("full", 4),), 135 + 20 + 40),  # a layer run again
        ((("offload", 4),), 135 + 40),
        ((("offload_o", 4),), 135 + 40 + 2),  # and what is fetched ahead
        ((("offload", 2), ("full", 2)), 135 + 10 + 40),  # what full layers kept is gone when the others are reached
        ((("full", 3), ("none", 1)), 135 + 15 + 50 + 30),
    ],
)
def test_peak(runs: tuple, peak: int) -> None:
    assert MEMORY.peak(runs) == peak


def device_for(peak: int) -> int:
    return math.ceil(135 + (peak - 135) / SHARE)


@pytest.mark.parametrize(
    ("limit", "runs"),
    [
        (None, (("none", 4),)),
        (365, (("none", 4),)),
        (364, (("full", 1), ("none", 3))),
        (195, (("full", 4),)),
        (194, (("offload", 4),)),
        (174, None),
    ],
)
def test_auto_keeps_what_fits(limit: int | None, runs: tuple | None) -> None:
    assert fitting_runs(MEMORY, None if limit is None else device_for(limit), ROOM) == runs


def test_of_long_rows_some_layers_are_whole_or_none() -> None:
    memory = dataclasses.replace(MEMORY, layers=16, row=LONG_ROW)
    two, one = (device_for(135 + 50 * whole + 30) for whole in (2, 1))
    assert fitting_runs(memory, two, ROOM) == (("offload_o", 14), ("none", 2))
    assert fitting_runs(memory, one, ROOM) == (("offload_o", 16),)


@pytest.mark.parametrize(
    ("host", "runs"),
    [
        (36, (("offload_o", 4),)),
        (35, (("offload_o", 3), ("full", 1))),
        (8, (("full", 4),)),
    ],
)
def test_offloaded_is_what_the_host_has_room_for(host: int, runs: tuple) -> None:
    assert choose_runs("offload", dataclasses.replace(MEMORY, row=LONG_ROW), None, host) == runs
    assert MEMORY.on_host(runs) <= host


def test_a_hosts_memory_is_divided_among_the_devices_of_all_its_processes() -> None:
    """And every device of the run has what the one with the least has."""
    gib = 2**30
    two_here = [Report(machine=1, process=process, device=80 * gib, host=96 * gib) for process in (0, 1)]
    assert shared_room(two_here) == Room(80 * gib, 24 * gib)
    assert shared_room(two_here[:1] * 2) == Room(80 * gib, 24 * gib)  # both of one process
    roomy = Report(machine=2, process=2, device=79 * gib, host=2**40)
    assert shared_room([*two_here, roomy]) == Room(79 * gib, 24 * gib)
    assert shared_room([roomy] * 4) == Room(79 * gib, PINNABLE // 4)  # as much as XLA pins for one process
    four = [roomy._replace(process=process, device=UNLIMITED) for process in range(4)]
    assert shared_room(four) == Room(None, PINNABLE)
    for mesh in (None, make_mesh(data=2, fsdp=4)):
        assert find_room(mesh) == planned_room(mesh.size if mesh else 1)


def test_what_cannot_fit_says_what_would_help() -> None:
    unit = 2**30
    sizes = {name: getattr(MEMORY, name) * unit for name in ("weights", "trained", "optimizer", "gradients")}
    work = {name: getattr(MEMORY, name) * unit for name in ("layer_work", "again_work", "loss_work", "ahead")}
    memory = dataclasses.replace(MEMORY, **sizes, **work)
    with pytest.raises(UserError, match=r"at least 180\.5 GiB .* it has 160\.0: shorten .*, split rows .*, or split"):
        choose_runs("auto", memory, 160 * unit, ROOM)
    several = dataclasses.replace(memory, rows=2)
    with pytest.raises(UserError, match=r"it has 160\.0: halve .*, shorten .*, or split"):
        choose_runs("full", several, 160 * unit, ROOM)
    with pytest.raises(
        UserError, match=r"it has 100\.0: weights and states alone take 135\.0, so split .*, pack .*, or train"
    ):
        choose_runs("auto", memory, 100 * unit, ROOM)


def test_a_policy_that_cannot_fit_is_refused_and_one_that_may_is_not() -> None:
    assert choose_runs("none", MEMORY, 350, ROOM) == (("none", 4),)  # 365, which is as much to the accuracy of a plan
    with pytest.raises(UserError, match=r"'none' needs .* choose 'auto'"):
        choose_runs("none", MEMORY, 347, ROOM)


def test_names_of_policies() -> None:
    """Those that scripts for other libraries give, too."""
    for name, runs in {True: (("full", 4),), False: (("none", 4),), "unsloth": (("none", 4),)}.items():
        assert choose_runs(name, MEMORY, None, ROOM) == runs
    with pytest.raises(UserError, match="'some' is unknown; use one of auto, none, full, offload"):
        choose_runs("some", MEMORY, None, ROOM)


RECORDS = Path(__file__).parents[2] / "bench" / "results" / "h200"
MEASURED = [
    row
    for row in json.loads((RECORDS / "step.json").read_text())["results"]
    # older records that are kept are of layers run again whole, or of long rows offloaded without attention's output; and a
    # note says where XLA takes more to compile than to run
    if ("peak_before_GiB" in row or row["policy"] == "none")
    and (row["policy"] != "offload" or row["seq"] < LONG_ROW or "planned_held_GiB" in row)
    and "note" not in row
    and row.get("shape", "llama3.1-8b") == "llama3.1-8b"
]
ON_MESHES = [
    row
    for name in ("scaling", "scaling_70b", "scaling_405b", "scaling_long")
    for row in json.loads((RECORDS / f"{name}.json").read_text())["results"]
]
H200 = 139 * 2**30


@functools.cache
def abstract_llama(shape: str) -> Llama:
    def build() -> Llama:
        model = random_packed_model(SHAPES[shape])
        add_lora(model, LoraConfig.create(r=16, lora_alpha=16))
        return model

    return nnx.eval_shape(build)


@pytest.mark.parametrize(
    "row", [*MEASURED, *ON_MESHES], ids=lambda row: f"{row['bs']}x{row['seq']} {row['policy']} {row.get('mesh', '')}"
)
def test_within_five_percent_of_what_was_measured(row: dict) -> None:
    model, mesh = abstract_llama(row.get("shape", "llama3.1-8b")), row.get("mesh")
    state = jax.eval_shape(make_optimizer("adamw_8bit", learning_rate=1e-4).init, nnx.state(model, nnx.Param))
    layout = MeshLayout.planned(model, mesh) if mesh else None
    length = part_length(row["seq"], layout.context) if layout and layout.context > 1 else row["seq"]
    tokens = row["bs"] * length // (layout.batch_shards if layout else 1)
    memory = step_memory(model, state, tokens, row=row["seq"], layout=layout)
    peak = memory.peak(choose_runs(row["policy"], memory, H200, ROOM)) / 2**30
    assert abs(peak / row["peak_GiB"] - 1) < 0.05, peak
