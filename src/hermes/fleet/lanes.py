"""The threads that compute: as many as requests may be under way at once, whichever models those are for.

Not one for each model: every thread that runs a kernel keeps a team of its own for it, and where the teams of a process
are more than its cores, OpenMP's threads go to sleep between two kernels instead of waiting for the next. That costs a
CNN a tenth to a third of its time, whoever computes.
"""

import ctypes
import queue
import threading
from collections.abc import Callable

__all__ = ["Lanes", "drop_kernel_threads"]

_SOFT = 1


class Lanes:
    """`resize` from one thread at a time; `submit` from any, never blocks."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def resize(self, count: int) -> None:
        """Have so many threads. While none of them is at work: those that go are waited for."""
        if count != len(self._threads):
            for _ in self._threads:
                self._calls.put(None)
            for thread in self._threads:
                thread.join()
            self._threads = [
                threading.Thread(target=self._run, name=f"hermes-fleet-{number}", daemon=True)
                for number in range(count)
            ]
            for thread in self._threads:
                thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Let the next free thread make this call, which must not raise."""
        self._calls.put(call)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def drop_kernel_threads() -> bool:
    """End the OpenMP team of the calling thread, which comes back with its next kernel; True if there was a way to.

    A few milliseconds at most.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return False
    return bool(pause(_SOFT) == 0)
