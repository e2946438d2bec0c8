"""Finds memory for a run beside the imports and the planning that come before it.

Where the system has free pages at hand this costs next to nothing and brings nothing. A virtual machine may have to
get each one from its host first: 1 to 2 ns a byte have been seen, several times what a disk takes to fill it. Pages
that were given back a moment ago are at hand.
"""

import threading
import time
from dataclasses import dataclass

from hermes.memory.arena import Arena

__all__ = ["WarmUp", "Warmed"]

CHUNK_BYTES = 16 * 2**20
LAST_CHUNKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmed:
    """What a warm-up did: bytes that are at hand now, and what one thread took for each of the last ones."""

    nbytes: int
    seconds_per_byte: float


class WarmUp:
    """One thread that takes up to `nbytes` of memory and touches it, chunk by chunk, until `stop`."""

    def __init__(self, nbytes: int) -> None:
        self._chunks: list[Arena] = []
        self._seconds: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(nbytes,), name="hermes-warm-up", daemon=True)
        self._thread.start()

    def stop(self) -> Warmed:
        """Give everything back. Idempotent."""
        self._stopped.set()
        self._thread.join()
        for chunk in self._chunks:
            chunk.close()
        self._chunks = []
        last = self._seconds[-LAST_CHUNKS:]
        return Warmed(
            nbytes=len(self._seconds) * CHUNK_BYTES,
            seconds_per_byte=sum(last) / (max(1, len(last)) * CHUNK_BYTES),
        )

    def _run(self, nbytes: int) -> None:
        for _ in range(nbytes // CHUNK_BYTES):
            if self._stopped.is_set():
                return
            start = time.perf_counter()
            chunk = Arena(CHUNK_BYTES)
            chunk.touch()
            self._chunks.append(chunk)
            self._seconds.append(time.perf_counter() - start)
