"""What no streaming can beat: resident passes, and in turns with them the same while BYTES are read beside each.

    python yardstick.py MODEL BUDGET BYTES WINDOW

The reads go past the page cache into a window of so many bytes, round and round, as a streaming run's do: a disk fills
buffers that stay in the processor's caches faster. Nobody waits for them but the end of the pass.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hermes.memory.allocator import keep_heap_tight

keep_heap_tight()
import torch  # noqa: E402
from work import Work, clock_passes, report  # noqa: E402

import hermes  # noqa: E402
from hermes.checkpoint import open_checkpoint, open_reader  # noqa: E402
from hermes.memory.arena import Arena  # noqa: E402

PIECE_BYTES = 4 << 20
NUM_AGENTS = 4


class Reading:
    """So many bytes of the checkpoint at each second pass, from its start on, by agents of their own."""

    def __init__(self, model: Path, nbytes: int, window_bytes: int) -> None:
        checkpoint = open_checkpoint(model)
        self.reader = open_reader(checkpoint)
        self.pieces: Iterator[tuple[int, int]] = itertools.cycle(
            (file, offset)
            for file, stamp in enumerate(checkpoint.files)
            for offset in range(0, stamp.nbytes - PIECE_BYTES + 1, PIECE_BYTES)
        )
        self.num_pieces = -(-nbytes // PIECE_BYTES)
        window = Arena(max(1, window_bytes // PIECE_BYTES) * PIECE_BYTES)
        window.touch()
        self.targets = itertools.cycle(
            window.view[begin : begin + PIECE_BYTES] for begin in range(0, window.nbytes, PIECE_BYTES)
        )
        self.pool = ThreadPoolExecutor(NUM_AGENTS)
        self.queue: deque[tuple[tuple[int, int], memoryview]] = deque()
        self.under_way: list[Future[None]] = []
        self.passes = 0

    def start(self, *_: object) -> None:
        """A pass begins."""
        self.passes += 1
        if self.passes % 2 == 0:
            self.queue.extend(zip(itertools.islice(self.pieces, self.num_pieces), self.targets, strict=False))
            self.under_way = [self.pool.submit(self.read) for _ in range(NUM_AGENTS)]

    def wait(self, *_: object) -> None:
        """A pass ends."""
        for read in self.under_way:
            read.result()
        self.under_way = []

    def read(self) -> None:
        """An agent's part."""
        with contextlib.suppress(IndexError):
            while True:
                (file, offset), target = self.queue.popleft()
                self.reader.read_into(file, offset, target, PIECE_BYTES)


def main() -> None:
    work, budget = Work(Path(sys.argv[1])), sys.argv[2]
    nbytes, window_bytes = map(int, sys.argv[3:])
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module = hermes.load(work.model, budget=budget, **work.load_options)
    reading = Reading(work.model, nbytes, window_bytes)
    module.register_forward_hook(reading.wait)  # inside what is clocked, as the start is
    seconds = clock_passes(module)
    module.register_forward_pre_hook(reading.start)
    load_seconds = time.perf_counter() - start
    for _ in range(1 if work.generates else 2):  # a decoder's second prompt would be no token
        outputs = work.perform(module)
    later = seconds[1:]
    report(
        work,
        load_seconds=load_seconds,
        pass_seconds=seconds,
        outputs=outputs,
        beside_seconds=statistics.median(later[0::2]),
        resident_seconds=statistics.median(later[1::2]),
    )


main()
