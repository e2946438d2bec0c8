"""How fast the checkpoint's disk gives its bytes to so many agents, and memory takes them in."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hermes.checkpoint.index import Checkpoint
from hermes.checkpoint.readers import Reader
from hermes.memory.arena import Arena
from hermes.memory.probe import num_cores
from hermes.profile.records import BandwidthRecord

__all__ = ["AGENT_COUNTS", "measure_bandwidth", "measure_drift", "measure_touch", "measure_windows"]

AGENT_COUNTS = (1, 2, 3, 4)
MIB = 2**20
WINDOWS = (8 * MIB, 16 * MIB, 24 * MIB, 32 * MIB, 64 * MIB, 128 * MIB)
"""Sizes of windows that a disk is timed with."""


def measure_bandwidth(
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    sample_bytes: int,
    agent_counts: Sequence[int] = AGENT_COUNTS,
    piece_sizes: Sequence[int] = (8 * MIB,),
    seconds: float = math.inf,
    lend: Callable[[int], Arena] = Arena,
) -> list[BandwidthRecord]:
    """Read up to `sample_bytes` for each setting, for `seconds` at most, spread over the files, past the page cache.

    Each setting reads its own places, so that no cache of the drive's serves the next one. A first piece of each agent
    does not count: after a pause a throttle lets a tenth of a second's bytes through at once. Holds one piece for each
    agent, of memory that `lend` gives. Blocking. Raises ReadError.
    """
    records = []
    turn = 0
    for piece_bytes in piece_sizes:
        places = _places(checkpoint, piece_bytes)
        count = max(1, min(len(places), sample_bytes // piece_bytes))
        for num_agents in agent_counts:
            chosen = [places[(turn + index) % len(places)] for index in range(num_agents + count)]
            turn += len(chosen)
            memory = lend(num_agents * piece_bytes)
            memory.touch()
            buffers = [[memory.part(number * piece_bytes, piece_bytes).view] for number in range(num_agents)]
            rate = _read(reader, chosen, buffers, seconds)
            records.append(BandwidthRecord(num_agents=num_agents, piece_bytes=piece_bytes, bytes_per_second=rate))
    return records


def measure_drift(
    records: Sequence[BandwidthRecord],
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    sample_bytes: int,
    seconds: float = math.inf,
    lend: Callable[[int], Arena] = Arena,
) -> float:
    """How many times what it gave for a good one of the records the disk gives now. Blocking. Raises ReadError."""
    best = max(record.bytes_per_second for record in records)
    then = max(records, key=lambda record: (record.bytes_per_second >= best / 2, record.num_agents, record.piece_bytes))
    (now,) = measure_bandwidth(
        checkpoint,
        reader,
        sample_bytes=sample_bytes,
        agent_counts=(then.num_agents,),
        piece_sizes=(then.piece_bytes,),
        seconds=seconds,
        lend=lend,
    )
    return now.bytes_per_second / then.bytes_per_second


def measure_windows(
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    window_bytes: int,
    most_bytes: int,
    num_agents: int = AGENT_COUNTS[-1],
    piece_bytes: int = 2 * MIB,
    sample_bytes: int = 256 * MIB,
    seconds: float = 0.2,
    rounds: int = 3,
) -> tuple[tuple[int, float], ...]:
    """Pairs of a window's size and how many times the rate into one of `window_bytes` the disk fills it with.

    A virtual disk's host copies what it reads, through the processor's caches. No larger window counts as faster than a
    smaller one: that would be noise. Reads `sample_bytes` for each, for `seconds` at most, the median of some rounds;
    holds the largest, `most_bytes` or `window_bytes`. None for a window below all that are tried. Blocking. Raises
    ReadError.
    """
    if window_bytes < WINDOWS[0]:
        return ()
    sizes = sorted({window_bytes, *(size for size in WINDOWS if size <= most_bytes)})
    places = _places(checkpoint, piece_bytes)
    count = max(1, sample_bytes // piece_bytes) + num_agents
    found: dict[int, list[float]] = {size: [] for size in sizes}
    memory = Arena(sizes[-1])
    memory.touch()
    turn = 0
    for _ in range(rounds):
        for size in sizes:
            chosen = [places[(turn + index) % len(places)] for index in range(count)]
            turn += count
            slots = [memory.part(begin, piece_bytes).view for begin in range(0, size - piece_bytes + 1, piece_bytes)]
            buffers = [slots[number::num_agents] for number in range(num_agents)]
            found[size].append(_read(reader, chosen, buffers, seconds))
    memory.close()
    rates = [statistics.median(found[size]) for size in sizes]
    rates = list(itertools.accumulate(reversed(rates), max))[::-1]
    whole = rates[sizes.index(window_bytes)]
    return tuple((size, rate / whole) for size, rate in zip(sizes, rates, strict=True))


def measure_touch(nbytes: int, *, step_bytes: int, chunk_bytes: int = 16 * MIB) -> tuple[float, ...]:
    """Seconds for each byte of memory that is written to for the first time: page faults, the kernel's and the host's.

    All cores at once, as agents do it; one figure for each `step_bytes`. Holds `nbytes` while it measures: memory that
    this machine has used lately comes cheaper than memory that its host must find first.
    """
    arenas: list[Arena] = []
    seconds = []
    num_chunks = max(1, min(nbytes, step_bytes) // chunk_bytes)
    with ThreadPoolExecutor(num_cores()) as pool:
        for _ in range(max(1, nbytes // (num_chunks * chunk_bytes))):
            chunks = [Arena(chunk_bytes) for _ in range(num_chunks)]
            arenas += chunks
            start = time.perf_counter()
            list(pool.map(Arena.touch, chunks))
            seconds.append((time.perf_counter() - start) / (num_chunks * chunk_bytes))
    for arena in arenas:
        arena.close()
    return tuple(seconds)


def _places(checkpoint: Checkpoint, piece_bytes: int) -> list[tuple[int, int]]:
    """(file, offset) of every whole piece; of the start of the largest file if there is none."""
    places = [
        (number, offset)
        for number, stamp in enumerate(checkpoint.files)
        for offset in range(0, stamp.nbytes - piece_bytes + 1, piece_bytes)
    ]
    largest = max(range(len(checkpoint.files)), key=lambda number: checkpoint.files[number].nbytes)
    return places or [(largest, 0)]


def _read(
    reader: Reader, places: Sequence[tuple[int, int]], buffers: Sequence[Sequence[memoryview]], most_seconds: float
) -> float:
    """Bytes a second, by as many agents as have buffers, each of which fills its own in turns."""
    num_agents = len(buffers)
    first, places = places[:num_agents], places[num_agents:]

    def agent(number: int) -> int:
        done = 0
        for (file, offset), buffer in zip(places[number::num_agents], itertools.cycle(buffers[number]), strict=False):
            done += reader.read_into(file, offset, buffer, 0)
            if time.perf_counter() - start > most_seconds:
                break
        return done

    def begin(number: int) -> None:
        reader.read_into(*first[number], buffers[number][0], 0)

    with ThreadPoolExecutor(num_agents, thread_name_prefix="hermes-probe") as pool:
        list(pool.map(begin, range(num_agents)))
        start = time.perf_counter()
        done = sum(pool.map(agent, range(num_agents)))
        seconds = time.perf_counter() - start
    return done / max(seconds, 1e-9)
