"""Ctrl-C and a scheduler's SIGTERM in the middle of a run: the step ends, a checkpoint is saved, then the run stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run has stopped as it was told, `message` says where it can go on. `exit_code` is the shell's for the signal."""

    def __init__(self, received: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + received


class Interrupts:
    """While it is entered, the first signal is noted in `received`; a second one interrupts at once.

    Signals reach the main thread alone: in another one nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
