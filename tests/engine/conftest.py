"""A small checkpoint with known bytes, engines over it, readers that do as they are told, and a search for leaks."""

import copy
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from hermes.checkpoint import open_checkpoint, open_reader
from hermes.engine import Engine, EngineConfig
from hermes.errors import ReadError
from hermes.memory.ledger import Ledger
from hermes.pipeload import plan_load, smallest_ring

PIECE_BYTES = 8192
#: Bytes of each tensor of each block: odd sizes, an empty one, some smaller than a piece, one of several pieces.
SIZES = [[10_001, 64], [30_000], [5, 20_000, 0], [4096, 4096, 4096], [12_345]]
PINNED_SIZES = [9000, 0, 77]
#: How its bytes come: as they are, doubled by a codec, or out of two extents.
WIDENED, MERGED = (3, 1), (3, 2)
EXTRA = "extra"


def wait_until(condition, seconds=10.0):
    """Poll; the only place where a test waits for other threads without a lock of its own."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def hermes_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hermes-")]


@pytest.fixture(autouse=True)
def no_leaks():
    """Law 5: whatever happened, no agent and no file is left once the engine is closed."""
    fds = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    yield
    wait_until(lambda: not hermes_threads())
    if fds is not None:
        assert len(os.listdir("/proc/self/fd")) <= len(fds)


@pytest.fixture
def unwatched(monkeypatch):
    """The Daemon Agent never wakes; real memory is looked at only when a pass ends."""
    monkeypatch.setattr("hermes.engine.daemon.WATCH_SECONDS", 3600.0)


@pytest.fixture
def weights(tmp_path):
    """Path of a safetensors file, and the bytes of each tensor in it."""
    rng = random.Random(7)
    names = [(f"b{b}.t{t}", n) for b, sizes in enumerate(SIZES) for t, n in enumerate(sizes)]
    names += [(f"pinned.{n}", size) for n, size in enumerate(PINNED_SIZES)] + [(EXTRA, 6000)]
    data = {name: rng.randbytes(nbytes) for name, nbytes in names}
    header, place = {}, 0
    for name, content in data.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [place, place + len(content)]}
        place += len(content)
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data.values()))
    return path, data


def double(source, target):
    target[::2] = source
    target[1::2] = source


class Scripted:
    """A reader that can be stopped at a gate, and made to fail at the n-th read."""

    def __init__(self, reader):
        self._reader = reader
        self.alignment = reader.alignment
        self.reads = []  # (offset, length), in the order in which they began
        self.gate = threading.Event()
        self.gate.set()
        self.fail_at = None
        self.error = ReadError("model.safetensors: reading failed")
        self.closed = 0
        self._lock = threading.Lock()

    def read_into(self, file, offset, target, required):
        with self._lock:
            self.reads.append((offset, len(target)))
            number = len(self.reads)
        self.gate.wait()
        if self.fail_at is not None and number >= self.fail_at:
            raise copy.copy(self.error)  # one of its own for each agent, as a system gives them
        return self._reader.read_into(file, offset, target, required)

    def check(self):
        self._reader.check()

    def close(self):
        self.closed += 1
        self._reader.close()


class Bench:
    """One engine, what each block should hold, and the loads it was made from."""

    def __init__(
        self,
        weights,
        *,
        resident=None,
        ring_bytes=None,
        window=1.0,
        direct=None,
        budget_bytes=1 << 40,
        address_alignment=64,
        **config,
    ):
        path, data = weights
        checkpoint = open_checkpoint(path)
        self.path = path
        self.reader = Scripted(open_reader(checkpoint, direct=direct))
        self.buffer_bytes = PIECE_BYTES + 2 * self.reader.alignment
        entries = checkpoint.tensors

        def load(name, *more, codec=None):
            nbytes = sum(len(data[n]) for n in (name, *more)) * (2 if codec else 1)
            extents = [entries[n].extent for n in (name, *more)]
            alignment = self.reader.alignment
            return plan_load(
                name,
                extents,
                nbytes,
                alignment=alignment,
                piece_bytes=PIECE_BYTES,
                address_alignment=address_alignment,
                codec=codec,
            )

        self.blocks, self.expected = [], []
        for b, sizes in enumerate(SIZES):
            loads, contents = [], []
            for t in range(len(sizes)):
                name = f"b{b}.t{t}"
                if (b, t) == WIDENED:
                    loads.append(load(name, codec=double))
                    contents.append(bytes(byte for byte in data[name] for _ in range(2)))
                elif (b, t) == MERGED:
                    loads.append(load(name, EXTRA))
                    contents.append(data[name] + data[EXTRA])
                else:
                    loads.append(load(name))
                    contents.append(data[name])
            self.blocks.append(loads)
            self.expected.append(contents)
        self.pinned = [load(f"pinned.{n}") for n in range(len(PINNED_SIZES))]
        self.pinned_expected = [data[f"pinned.{n}"] for n in range(len(PINNED_SIZES))]
        self.extra = load(EXTRA)
        self.extra_expected = data[EXTRA]
        self.resident = [frozenset(loads) for loads in resident or [()] * len(SIZES)]
        slots = [[one.slot_bytes for one in loads] for loads in self.blocks]
        self.ring_bytes = int(smallest_ring(slots) * window) if ring_bytes is None else ring_bytes
        self.ledger = Ledger(budget_bytes)
        options = {"num_agents": 2, "buffer_bytes": self.buffer_bytes, "limit_bytes": 1 << 40} | config
        try:
            self.engine = Engine(
                self.blocks,
                pinned=self.pinned,
                reader=self.reader,
                ledger=self.ledger,
                config=EngineConfig(ring_bytes=self.ring_bytes, resident=self.resident, **options),
            )
        except BaseException:
            self.reader.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.gate.set()
        self.engine.close()

    def at(self, place, nbytes):
        arena = self.engine.store if place.resident else self.engine.ring
        return bytes(arena.view[place.offset : place.offset + nbytes])

    def check(self, block):
        """Want a block and compare every byte of it."""
        places = self.engine.want(block)
        assert [self.at(p, len(c)) for p, c in zip(places, self.expected[block], strict=True)] == self.expected[block]
        return places

    def check_pass(self, order=None):
        self.engine.begin_pass()
        for block in range(len(self.blocks)) if order is None else order:
            self.check(block)
        self.engine.end_pass()

    def streamed_bytes(self, block):
        kept = self.resident[block]
        return sum(load.read_bytes for number, load in enumerate(self.blocks[block]) if number not in kept)

    def slot(self, block, load):
        return self.blocks[block][load].slot_bytes


@pytest.fixture
def bench(weights):
    """Makes engines over the same file; each is closed, at the end of the test at the latest."""
    made = []

    def make(**options):
        made.append(Bench(weights, **options))
        return made[-1]

    yield make
    for one in made:
        one.reader.gate.set()
        one.engine.close()


@pytest.fixture
def eventually():
    """Waits for a condition, ten seconds at most."""
    return wait_until


@pytest.fixture
def threads():
    """The agents that are alive."""
    return hermes_threads
