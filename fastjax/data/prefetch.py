"""Batches made ahead of the step that takes them, by a thread: what a step waits for its data is counted."""

import queue
import threading
import time
from collections.abc import Iterator

AHEAD = 2  # one under way to the device, one ready


class Prefetched[T](Iterator[T]):
    """The items of an iterator, in order. Close it, or the thread goes on waiting to hand over the next one."""

    def __init__(self, items: Iterator[T]) -> None:
        self.waited = 0.0  # seconds in which there was nothing to take
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="fastjax-data", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        began = time.perf_counter()
        item, error = self._queue.get()
        self.waited += time.perf_counter() - began
        if error is not None:
            self._hand_over(None, error)  # for whoever asks again
            raise error
        return item  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        self._closed.set()
        while not self._queue.empty():  # a thread that waits for room goes on and ends
            self._queue.get_nowait()
        self._thread.join()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._hand_over(item, None):
                    return
            raise StopIteration
        except BaseException as error:  # raised where the items are taken
            self._hand_over(None, error)

    def _hand_over(self, item: T | None, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
