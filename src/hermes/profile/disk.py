"""How fast the checkpoint's disk gives its bytes to so many agents, and memory takes them in."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hermes.checkpoint.index import Checkpoint
from hermes.checkpoint.readers import Reader
from hermes.memory.arena import Arena
from hermes.profile.records import BandwidthRecord

__all__ = ["AGENT_COUNTS", "measure_bandwidth", "measure_touch", "refresh_bandwidths"]

AGENT_COUNTS = (1, 2, 3, 4)
MIB = 2**20


def measure_bandwidth(
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    sample_bytes: int,
    agent_counts: Sequence[int] = AGENT_COUNTS,
    piece_sizes: Sequence[int] = (8 * MIB,),
) -> list[BandwidthRecord]:
    """Read up to `sample_bytes` for each setting, spread over the files, past the page cache.

    Each setting reads its own places, so that no cache of the drive's serves the next one. Holds one piece for each
    agent. Blocking. Raises ReadError.
    """
    records = []
    turn = 0
    for piece_bytes in piece_sizes:
        places = _places(checkpoint, piece_bytes)
        count = max(1, min(len(places), sample_bytes // piece_bytes))
        for num_agents in agent_counts:
            chosen = [places[(turn + index) % len(places)] for index in range(count)]
            turn += count
            rate = _read(reader, chosen, num_agents, piece_bytes)
            records.append(BandwidthRecord(num_agents=num_agents, piece_bytes=piece_bytes, bytes_per_second=rate))
    return records


def refresh_bandwidths(
    records: Sequence[BandwidthRecord], checkpoint: Checkpoint, reader: Reader, *, sample_bytes: int
) -> list[BandwidthRecord]:
    """The records, scaled half way to what a good one of them gives now: disks drift, and samples err. Blocking."""
    best = max(record.bytes_per_second for record in records)
    then = max(records, key=lambda record: (record.bytes_per_second >= best / 2, record.num_agents, record.piece_bytes))
    (now,) = measure_bandwidth(
        checkpoint,
        reader,
        sample_bytes=sample_bytes,
        agent_counts=(then.num_agents,),
        piece_sizes=(then.piece_bytes,),
    )
    scale = (1 + now.bytes_per_second / then.bytes_per_second) / 2
    return [replace(record, bytes_per_second=record.bytes_per_second * scale) for record in records]


def measure_touch(nbytes: int, *, chunk_bytes: int = 16 * MIB) -> float:
    """Seconds for each byte of memory that is written to for the first time: page faults, the kernel's and the host's.

    Holds `nbytes` while it measures, in chunks: memory that this machine has used lately comes cheaper than memory that
    its host must find first, so the dearer half of the chunks counts.
    """
    arenas, seconds = [], []
    for _ in range(max(1, nbytes // chunk_bytes)):
        arena = Arena(chunk_bytes)
        start = time.perf_counter()
        _touch(arena)
        seconds.append(time.perf_counter() - start)
        arenas.append(arena)
    for arena in arenas:
        arena.close()
    dearer = sorted(seconds)[len(seconds) // 2 :]
    return sum(dearer) / len(dearer) / chunk_bytes


def _touch(arena: Arena) -> None:
    """Have every page there."""
    pages = arena.view[:: os.sysconf("SC_PAGE_SIZE")]
    pages[:] = bytes(len(pages))


def _places(checkpoint: Checkpoint, piece_bytes: int) -> list[tuple[int, int]]:
    """(file, offset) of every whole piece; of the start of the largest file if there is none."""
    places = [
        (number, offset)
        for number, stamp in enumerate(checkpoint.files)
        for offset in range(0, stamp.nbytes - piece_bytes + 1, piece_bytes)
    ]
    largest = max(range(len(checkpoint.files)), key=lambda number: checkpoint.files[number].nbytes)
    return places or [(largest, 0)]


def _read(reader: Reader, places: Sequence[tuple[int, int]], num_agents: int, piece_bytes: int) -> float:
    arenas = [Arena(piece_bytes) for _ in range(num_agents)]
    for arena in arenas:
        _touch(arena)

    def agent(number: int) -> int:
        return sum(
            reader.read_into(file, offset, arenas[number].view, 0) for file, offset in places[number::num_agents]
        )

    with ThreadPoolExecutor(num_agents, thread_name_prefix="hermes-probe") as pool:
        start = time.perf_counter()
        done = sum(pool.map(agent, range(num_agents)))
        seconds = time.perf_counter() - start
    for arena in arenas:
        arena.close()
    return done / max(seconds, 1e-9)
