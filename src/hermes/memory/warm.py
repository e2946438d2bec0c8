"""Finds memory for a run beside the imports and the planning that come before it.

Where the system has free pages at hand this costs next to nothing and brings nothing. A virtual machine may have to
get each one from its host first: 1 to 3 ns a byte have been seen, several times what a disk takes to fill it.
"""

import threading
import time

from hermes.memory.arena import HUGE_PAGE_BYTES, Arena

__all__ = ["WarmUp", "Warmed"]

CHUNK_BYTES = 16 * 2**20
LAST_CHUNKS = 8


class Warmed:
    """A range of addresses whose first `nbytes` are backed by memory; to be lent, taken, and then closed.

    Attributes:
        nbytes: of memory that was found.
        seconds_per_byte: what one thread took for each of the last ones.
    """

    def __init__(self, arena: Arena, nbytes: int, seconds_per_byte: float) -> None:
        self.nbytes = nbytes
        self.seconds_per_byte = seconds_per_byte
        self._arena = arena
        self._taken_bytes = 0

    def take(self, nbytes: int) -> Arena:
        """The next so many bytes of the range, or others where it has no more."""
        begin = self._taken_bytes
        if not nbytes or begin + nbytes > self._arena.nbytes:
            return Arena(nbytes)
        self._taken_bytes += -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        return self._arena.part(begin, nbytes)

    def lend(self, nbytes: int) -> Arena:
        """Memory for a moment: what is to be taken next, or other memory where there is less."""
        if self._taken_bytes + nbytes > self.nbytes:
            return Arena(nbytes)
        return self._arena.part(self._taken_bytes, nbytes)

    def close(self) -> None:
        """Give back what nobody has taken. Idempotent."""
        self._arena.discard(self._taken_bytes, self._arena.nbytes - self._taken_bytes)
        self._arena = Arena(0)


class WarmUp:
    """One thread that touches the first `nbytes` of a range of `range_bytes`, chunk by chunk, until `stop`."""

    def __init__(self, nbytes: int, range_bytes: int) -> None:
        self.nbytes = 0
        """Of memory that is there now."""
        try:
            self._arena = Arena(range_bytes)
        except OSError:  # more addresses than this system promises to one process
            self._arena = Arena(0)
        self._most_bytes = min(nbytes, self._arena.nbytes)
        self._seconds: list[float] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hermes-warm-up", daemon=True)
        self._thread.start()

    def shrink(self, nbytes: int) -> None:
        """Hold no more than this from now on; what is above is given back."""
        with self._lock:
            self._most_bytes = min(self._most_bytes, max(0, nbytes))
            if self.nbytes > self._most_bytes:
                self._arena.discard(self._most_bytes, self.nbytes - self._most_bytes)
                self.nbytes = self._most_bytes

    def stop(self) -> Warmed:
        """End it; the memory, to be taken or given back."""
        self._stopped.set()
        self._thread.join()
        last = self._seconds[-LAST_CHUNKS:]
        return Warmed(self._arena, self.nbytes, sum(last) / (max(1, len(last)) * CHUNK_BYTES))

    def _run(self) -> None:
        while not self._stopped.is_set():
            begin = self.nbytes
            if begin + CHUNK_BYTES > self._most_bytes:
                return
            start = time.perf_counter()
            self._arena.touch(begin, CHUNK_BYTES)
            self._seconds.append(time.perf_counter() - start)
            with self._lock:
                if begin + CHUNK_BYTES <= self._most_bytes:
                    self.nbytes = begin + CHUNK_BYTES
                else:
                    self._arena.discard(self._most_bytes, begin + CHUNK_BYTES - self._most_bytes)
