"""The thread that computes, for all models, and the requests under way on it, which leave it to each other.

Not a thread for each request: every thread that runs kernels keeps an OpenMP team of its own, and where those are more
threads than cores, they go to sleep between two kernels instead of waiting for the next. That costs a CNN a tenth to a
third of its time. So requests are greenlets: to leave one in the middle of its forward and go on with another takes
microseconds (and what the caches lose, 3 % of a CNN's time where it happens at every layer).
"""

import ctypes
import queue
import threading
from collections.abc import Callable

import torch
from greenlet import getcurrent, greenlet

__all__ = ["Lanes", "drop_kernel_threads"]

_SOFT = 1


class Lanes:
    """`go` and `close` from any thread; `wait` and `may_wait` from within a request, which computes on this device."""

    def __init__(self, device_type: str = "cpu") -> None:
        self._autocasts = tuple({"cpu", device_type})
        self._orders: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._hub: greenlet | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Have the thread. Again changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hermes-fleet-compute", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Once no request is under way: end the thread. Idempotent."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    @property
    def is_own_thread(self) -> bool:
        """Whether it is the thread that asks."""
        return threading.current_thread() is self._thread

    def go(self, name: str, call: Callable[[], None]) -> None:
        """Let the thread go on with what is under way under this name, or begin `call`, which must not raise.

        Never blocks. At most one `go` is outstanding: the next one comes when the thread has been left.
        """
        self._orders.put((name, call))

    def wait(self) -> None:
        """Leave the thread to others, until `go`.

        torch's modes of gradients and inference, which belong to threads, come back with it.
        """
        if self._hub is None:
            raise RuntimeError("nothing is under way")
        with torch.inference_mode(False):
            self._hub.switch()

    def may_wait(self) -> bool:
        """Whether others would compute as they do alone: not with autocast on, or a mode that changes functions."""
        return not (
            any(map(torch.is_autocast_enabled, self._autocasts))
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
        )

    def _run(self) -> None:
        self._hub = getcurrent()
        under_way: dict[str, greenlet] = {}
        while (order := self._orders.get()) is not None:
            name, call = order
            request = under_way.pop(name, None) or greenlet(call)
            request.switch()
            if not request.dead:
                under_way[name] = request
            del order, call, request  # nothing of what was asked stays in memory until the next order


def drop_kernel_threads() -> bool:
    """End the OpenMP team of the calling thread, which comes back with its next kernel; True if there was a way to.

    A few milliseconds at most.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return False
    return bool(pause(_SOFT) == 0)
