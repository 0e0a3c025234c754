"""The processes of a run on one machine: started together, watched, and ended together.

The first one has the terminal. What the others say goes to a file each, and is shown if one of them fails. Each is in a
session of its own, so that Ctrl-C reaches it once, from here, and a checkpoint is saved before the run stops. When one
dies the others wait for it in a collective: they get GRACE_S to end by themselves, and are killed then.
"""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from fastjax.errors import UserError

GRACE_S = 10.0
POLL_S = 0.02
SHOWN_LINES = 20
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ProcessFailed(Exception):
    """One of the processes has failed, and the others were ended; `exit_code` is its own, as a shell has it, and
    `last_words` what it said at the end where nobody saw it.
    """

    def __init__(self, exit_code: int, message: str, last_words: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.last_words = last_words


def launch(command: Sequence[str], processes: int, logs: Path, environ: Mapping[str, str]) -> int:
    """Runs `command` as so many processes until all have ended; each is told by flags which one it is.

    Returns 0, or the shell's exit code for a signal that this process was sent and by which the run has stopped.

    Args:
        logs: a directory, made if missing, for what processes other than the first write.
        environ: of the processes; each sees its share of the GPUs that this one would.
    """
    devices = split_devices(visible_devices(environ), processes)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    children: list[subprocess.Popen] = []
    with forwarding(children) as received:
        try:
            for index in range(processes):
                words = [*command, *flags, "--process", str(index)]
                children.append(start(words, index, logs, {**environ, **devices[index]}))
            return watch(children, logs, received)
        finally:
            end(children)


def start(words: Sequence[str], index: int, logs: Path, environ: Mapping[str, str]) -> subprocess.Popen:
    if index == 0:
        return subprocess.Popen(words, env=environ, start_new_session=True)
    logs.mkdir(parents=True, exist_ok=True)
    with log_path(logs, index).open("w") as log:
        return subprocess.Popen(words, env=environ, start_new_session=True, stdout=log, stderr=log)


def watch(children: Sequence[subprocess.Popen], logs: Path, received: Sequence[int]) -> int:
    """Until all have ended well, or as the signals `received` told them; of others that fail the first one is told of."""
    ends = in_order_of_their_ends(children)
    for _ in children:
        first = ends.get()
        if children[first].returncode:
            break
    else:
        return 0
    wait_for(children, GRACE_S)
    codes = [child.poll() for child in children]
    stopped = [number for number in received if codes[first] in (-number, 128 + number)]
    if stopped:
        return 128 + stopped[0]
    # one that was killed is the cause, also where its end comes later than that of the collective that it broke in others;
    # and so is one that is silent where JAX has aborted those that could not go on without it
    killed = [index for index, code in enumerate(codes) if code == -signal.SIGKILL]
    silent = [index for index, code in enumerate(codes) if code is None and codes[first] == -signal.SIGABRT]
    first = next(iter([*killed, *silent]), first)
    raise obituary(first, codes[first], len(children), logs)


def in_order_of_their_ends(children: Sequence[subprocess.Popen]) -> queue.SimpleQueue[int]:
    """Their numbers, each put there when it has ended: those that fail for another's end do so within milliseconds."""
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait(index: int) -> None:
        children[index].wait()
        ends.put(index)

    for index in range(len(children)):
        threading.Thread(target=wait, args=(index,), daemon=True).start()
    return ends


def wait_for(children: Sequence[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, but no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def end(children: Sequence[subprocess.Popen]) -> None:
    """Kills those that are still there: in a collective that will never be complete they hear nothing else."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()


def obituary(index: int, code: int | None, processes: int, logs: Path) -> ProcessFailed:
    """Of a process that ended with `code`, minus the signal if by one, None if it had to be killed; of SIGKILL no process
    says anything.
    """
    if code is None:
        code, how = -signal.SIGKILL, "did not answer any more"
    else:
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    message = f"process {index} of {processes} {how}; the others were ended too"
    path = log_path(logs, index)
    lines = path.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if index and code != -signal.SIGKILL else []
    last_words = "".join(f"{line}\n" for line in [f"the end of {path}:", *(f"  {line}" for line in lines)] if lines)
    return ProcessFailed(code if code > 0 else 128 - code, message, last_words)


def log_path(logs: Path, index: int) -> Path:
    return logs / f"process-{index}.log"


@contextlib.contextmanager
def forwarding(children: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Signals that end a program are handed on to all children, which decide when to stop; yields those received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {each: signal.signal(each, forward) for each in FORWARDED}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def visible_devices(environ: Mapping[str, str], directory: Path = Path("/dev")) -> list[str]:
    """The GPUs that a process of this environment sees, found without starting a runtime on them."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    return sorted((match[1] for name in names if (match := re.fullmatch(r"nvidia(\d+)", name))), key=int)


def split_devices(devices: Sequence[str], processes: int) -> list[dict[str, str]]:
    """What each process's environment has of its own: an equal share of the GPUs, nothing where there are none."""
    if not devices:
        return [{} for _ in range(processes)]
    if len(devices) % processes:
        raise UserError(
            f"{len(devices)} GPUs do not split over --processes {processes}: give a number that divides {len(devices)}, or"
            " choose among the GPUs with CUDA_VISIBLE_DEVICES."
        )
    share = len(devices) // processes
    shares = [devices[index * share : (index + 1) * share] for index in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(each)} for each in shares]
