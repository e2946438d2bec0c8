"""Reads that nobody waits for but the end of a pass: what a disk costs those who compute beside it."""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hermes.checkpoint import Reader, open_checkpoint, open_reader
from hermes.memory.arena import Arena

__all__ = ["Reading"]

PIECE_BYTES = 4 << 20
NUM_AGENTS = 4


class Reading:
    """So many bytes of the checkpoints between `start` and `wait`, by agents of their own.

    They go past the page cache into a window of so many bytes, round and round, as a streaming run's do: a disk fills
    buffers that stay in the processor's caches faster.
    """

    def __init__(self, checkpoints: Sequence[Path], nbytes: int, window_bytes: int) -> None:
        places = []
        for path in checkpoints:
            checkpoint = open_checkpoint(path)
            reader = open_reader(checkpoint)
            places += [
                (reader, file, offset)
                for file, stamp in enumerate(checkpoint.files)
                for offset in range(0, stamp.nbytes - PIECE_BYTES + 1, PIECE_BYTES)
            ]
        self._places = itertools.cycle(places)
        self._num_pieces = -(-nbytes // PIECE_BYTES)
        window = Arena(max(1, window_bytes // PIECE_BYTES) * PIECE_BYTES)
        window.touch()
        self._targets: Iterator[memoryview] = itertools.cycle(
            window.view[begin : begin + PIECE_BYTES] for begin in range(0, window.nbytes, PIECE_BYTES)
        )
        self._pool = ThreadPoolExecutor(NUM_AGENTS)
        self._queue: deque[tuple[tuple[Reader, int, int], memoryview]] = deque()
        self._under_way: list[Future[None]] = []

    def start(self) -> None:
        """Begin to read; never blocks."""
        self._queue.extend(zip(itertools.islice(self._places, self._num_pieces), self._targets, strict=False))
        self._under_way = [self._pool.submit(self._read) for _ in range(min(NUM_AGENTS, self._num_pieces))]

    def wait(self) -> None:
        """Until all is read, if anything is."""
        for read in self._under_way:
            read.result()
        self._under_way = []

    def _read(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                (reader, file, offset), target = self._queue.popleft()
                reader.read_into(file, offset, target, PIECE_BYTES)
