"""Failures that are another process's: whose, in a sentence, without a traceback of the innocent.

Of a process that dies the others hear by a collective or a wait that fails, with the name of a socket in its message. Which
of them is gone they find out together: all that are left meet at the coordinator, which after a moment names who is absent.
Where the coordinator itself is gone, JAX ends the rest and says so.
"""

import re

import jax

from fastjax.distributed.roles import wait_for_all

MEETING_S = 3.0
# what XLA says, with whatever type of error, of its coordinator, gloo and NCCL
SIGNS = re.compile(r"[cC]oordination ?[sS]ervice|Gloo \S+ failed|remote process exited")
ABSENT = re.compile(r"^(?:\S*task:)?(\d+)$|\bTask (\d+) heartbeat", re.MULTILINE)


def is_of_another(error: BaseException | None) -> bool:
    """Whether this error, or one that it follows from, is that another process has gone."""
    while error is not None:
        if SIGNS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def who_is_gone(error: Exception) -> str:
    """One sentence. Every process that is left asks, once."""
    try:
        wait_for_all("who is left", MEETING_S)
    except jax.errors.JaxRuntimeError as told:
        names = sorted({int(one or other) for one, other in ABSENT.findall(str(told))})
        if names:
            who = f"process {names[0]} is" if len(names) == 1 else f"processes {', '.join(map(str, names))} are"
            return f"{who} gone, and nothing goes on without: what was said there last says why."
    return f"the link to other processes broke ({str(error).splitlines()[0][:200]})."
