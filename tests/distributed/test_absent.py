"""Errors that processes get when another one dies, as they were seen in runs of two and three: told by who is gone."""

import jax
import pytest

from fastjax.distributed import absent
from fastjax.distributed.absent import is_of_another, who_is_gone
from fastjax.errors import UserError

BROKEN = "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43925"
SAVING = "Timed out while waiting for async_commit_complete barrier."
LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted"
MEETING = """DEADLINE_EXCEEDED: Barrier timed out. Id: who is left::0.
# of tasks that reached the barrier: 2/4.
The first task at the barrier: 0. Some timed out task names:
2
13

RPC: /xla.coordination.CoordinationService/Barrier [type.googleapis.com/tensorflow.CoordinationServiceError='']"""


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "of_another"),
    [
        (ValueError(BROKEN), True),
        (raised(TimeoutError(SAVING), jax.errors.JaxRuntimeError(LEADER)), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), False),
        (raised(UserError("could not be written"), OSError("No space left on device")), False),
    ],
)
def test_whose_failure_it_is(error: Exception, of_another: bool) -> None:
    assert is_of_another(error) is of_another


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (MEETING, "processes 2, 13 are gone"),
        (
            "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.",
            "process 1 is gone",
        ),
        (None, "the link to other processes broke (UNKNOWN: Gloo all-reduce failed"),
    ],
)
def test_who_is_gone(answer: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(what: str, seconds: float) -> None:
        if answer:
            raise jax.errors.JaxRuntimeError(answer)

    monkeypatch.setattr(absent, "wait_for_all", meet)
    assert who_is_gone(ValueError(BROKEN)).startswith(told)
