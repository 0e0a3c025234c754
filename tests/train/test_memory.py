"""The planner's arithmetic: policies that fit are chosen, and what cannot fit says so."""

import pytest

from fastjax.errors import UserError
from fastjax.train.memory import StepMemory
from fastjax.train.recompute import SHARE, choose_runs, fitting_runs

MEMORY = StepMemory(
    layers=4,
    weights=100,
    trained=10,
    optimizer=5,
    gradients=10,
    kept={"none": 50, "full": 5, "offload": 0},
    layer_work=20,
    again_work=40,
    loss_work=30,
)


@pytest.mark.parametrize(
    ("runs", "peak"),
    [
        ((("none", 4),), 125 + 200 + 30),  # all that is kept, in the loss
        ((("full", 4),), 125 + 20 + 40),  # a layer run again
        ((("offload", 4),), 125 + 40),
        ((("full", 3), ("none", 1)), 125 + 15 + 50 + 30),
    ],
)
def test_peak(runs: tuple, peak: int) -> None:
    assert MEMORY.peak(runs) == peak


@pytest.mark.parametrize(
    ("limit", "runs"),
    [
        (None, (("none", 4),)),
        (355, (("none", 4),)),
        (354, (("full", 1), ("none", 3))),
        (185, (("full", 4),)),
        (184, (("offload", 4),)),
        (164, None),
    ],
)
def test_auto_keeps_what_fits(limit: int | None, runs: tuple | None) -> None:
    assert fitting_runs(MEMORY, None if limit is None else limit / SHARE) == runs  # pyright: ignore[reportArgumentType]


def test_what_cannot_fit_says_what_would_help() -> None:
    unit = 2**30
    sizes = {name: getattr(MEMORY, name) * unit for name in ("weights", "trained", "optimizer", "gradients")}
    work = {name: getattr(MEMORY, name) * unit for name in ("layer_work", "again_work", "loss_work")}
    kept = {name: size * unit for name, size in MEMORY.kept.items()}
    memory = StepMemory(layers=4, **sizes, **work, kept=kept)
    with pytest.raises(UserError, match=r"at least 165\.0 GiB .* it has 100\.0: halve .*, shorten .*, or split"):
        choose_runs("auto", memory, 100 * unit)


def test_unknown_policy() -> None:
    with pytest.raises(UserError, match="'some' is unknown; use one of auto, none, full, offload"):
        choose_runs("some", MEMORY, None)
