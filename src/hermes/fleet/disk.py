"""One disk for several engines: so many reads at a time, the most urgent model's first."""

import heapq
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hermes.checkpoint import Reader
from hermes.checkpoint.index import Extent

__all__ = ["DiskTurns", "PacedReader"]


class DiskTurns:
    """Lets `num_reads` reads through at a time. Of those that wait, the one with the lowest urgency number goes first.

    Urgency is asked for when a read begins to wait; among equals, whoever has waited longest. Readers wait for
    milliseconds, one read of another's, and there is one for each Loading Agent: none starves for longer than the
    others have agents, each of which comes back behind it with an urgency that only time makes later.
    """

    def __init__(self, num_reads: int) -> None:
        self._lock = threading.Lock()
        self._free = num_reads
        self._waiting: list[tuple[float, int, threading.Lock]] = []
        self._number = 0

    @contextmanager
    def turn(self, urgency: float) -> Iterator[None]:
        """Blocks until one of the places is free."""
        with self._lock:
            gate: threading.Lock | None = None
            if self._free:
                self._free -= 1
            else:
                gate = threading.Lock()
                gate.acquire()
                self._number += 1
                heapq.heappush(self._waiting, (urgency, self._number, gate))
        if gate is not None:
            gate.acquire()
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    heapq.heappop(self._waiting)[2].release()
                else:
                    self._free += 1


class PacedReader(Reader):
    """A reader whose reads into engines' memory take turns with other models'. Closes the one it was made of."""

    def __init__(self, reader: Reader, disk: DiskTurns, urgency: Callable[[], float]) -> None:
        self._reader, self._disk, self._urgency = reader, disk, urgency
        self.alignment = reader.alignment

    def read_into(self, file: int, offset: int, target: memoryview, required: int) -> int:
        """As the reader's, in turn."""
        with self._disk.turn(self._urgency()):
            return self._reader.read_into(file, offset, target, required)

    def read_bytes(self, extent: Extent) -> bytes:
        """As the reader's."""
        return self._reader.read_bytes(extent)

    def check(self) -> None:
        """As the reader's."""
        self._reader.check()

    def close(self) -> None:
        """As the reader's."""
        self._reader.close()
