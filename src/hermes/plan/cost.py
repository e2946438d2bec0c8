"""What a plan will cost, by driving the engine's own state machine with a clock that is only counted.

The disk is one server: loads come in the order they were ordered, at the measured rate, and later where it was idle or
their memory is touched for the first time, which takes the cores from the Inference Agent, too. That is the other
server. What is packed goes through a third: the cores, on which agents unpack while others read. Units take their
measured seconds where all weights stream, as they did when those were measured, and fewer the fewer stream.
"""

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass

from hermes.pipeload import BlockDone, BlockWanted, Compute, Fetch, LoadFetched, Order, Pipeline
from hermes.plan.problem import TOUCH_STEP_BYTES, Problem, UnitCost

__all__ = [
    "START_SECONDS", "Prediction", "least_seconds", "part_computed", "simulate", "streamed_reads", "touch_seconds",
]  # fmt: skip

SIMULATED_PASSES = 3
START_SECONDS = 2.5e-4
"""Until a disk that was idle reads again: an agent wakes, and orders. A window of one load pays it for each block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Seconds of the cold pass, of a steady one, and of all."""

    first_pass_seconds: float
    steady_pass_seconds: float
    total_seconds: float


def least_seconds(
    problem: Problem,
    blocks: Sequence[Sequence[int]],
    resident: Sequence[Set[int]],
    bytes_per_second: float,
    packed: Sequence[Set[int]] = (),
) -> float:
    """What `simulate` predicts at least for all passes: reading alone, or computing alone, without either waiting.

    Memory that stays is touched while it is read into, once.
    """
    reads = [[n for unit in block for n in problem.units[unit].read_bytes] for block in blocks]
    streamed = sum(streamed_reads(reads, resident, packed))
    later = problem.num_passes - 1
    units = [problem.units[unit] for block in blocks for unit in block]
    share = part_computed(problem, reads, resident)
    slots = ([n for unit in block for n in problem.units[unit].slot_bytes] for block in blocks)
    kept = sum(loads[load] for loads, stay in zip(slots, resident, strict=False) for load in stay)
    return max(
        (sum(map(sum, reads)) + later * streamed) / bytes_per_second
        + touch_seconds(problem.touch_seconds_per_byte, 0, kept),
        sum(unit.first_seconds for unit in units) + later * share * sum(unit.next_seconds for unit in units),
    )


def streamed_reads(
    reads: Sequence[Sequence[int]], resident: Sequence[Set[int]], packed: Sequence[Set[int]]
) -> list[int]:
    """Bytes of each load that every pass reads: those of `reads`, by block, that do not stay, packed or not."""
    return [
        nbytes
        for block, loads in enumerate(reads)
        for load, nbytes in enumerate(loads)
        if load not in resident[block] and not (packed and load in packed[block])
    ]


def touch_seconds(seconds_per_byte: Sequence[float], taken_bytes: int, nbytes: int) -> float:
    """Seconds to touch `nbytes` more when `taken_bytes` have been touched before.

    A system has some memory at hand, and must find the rest: `seconds_per_byte` has a figure for each further
    `TOUCH_STEP_BYTES`.
    """
    seconds = 0.0
    while nbytes > 0 and seconds_per_byte:
        step = min(taken_bytes // TOUCH_STEP_BYTES, len(seconds_per_byte) - 1)
        last = step == len(seconds_per_byte) - 1
        part = nbytes if last else min(nbytes, (step + 1) * TOUCH_STEP_BYTES - taken_bytes)
        seconds += part * seconds_per_byte[step]
        taken_bytes, nbytes = taken_bytes + part, nbytes - part
    return seconds


def simulate(
    problem: Problem,
    blocks: Sequence[Sequence[int]],
    resident: Sequence[Set[int]],
    ring_bytes: int,
    bytes_per_second: float,
    *,
    ahead: bool = True,
    packed: Sequence[Set[int]] = (),
) -> Prediction:
    """Run the workload's passes through `Pipeline` in simulated time.

    Args:
        problem: costs of units.
        blocks: unit numbers of each block; those beyond the pass are left out by the caller.
        resident: for each block, its loads that stay.
        ring_bytes: the window.
        bytes_per_second: of the disk.
        ahead: False for the sequential engine.
        packed: for each block, its loads that stay packed: read once, unpacked at every visit.
    """
    units = problem.units
    slots = [[n for unit in block for n in units[unit].slot_bytes] for block in blocks]
    reads = [[n for unit in block for n in units[unit].read_bytes] for block in blocks]
    boundary = problem.boundary_seconds
    first = [boundary + sum(units[unit].first_seconds for unit in block) for block in blocks]
    if first:
        first[0] += problem.cold_seconds
    share = part_computed(problem, reads, resident)
    later = [boundary + share * sum(units[unit].next_seconds for unit in block) for block in blocks]
    unpacks = [
        [seconds / problem.num_cores for unit in block for seconds in _unpack_seconds(units[unit])] for block in blocks
    ]
    pipeline = Pipeline(slots, resident, ring_bytes, ahead=ahead)
    disk: deque[tuple[float, Fetch, float]] = deque()  # (end, order, its part of `faulting`), in order
    disk_free = cores_free = now = 0.0
    touched_bytes = 0  # of the ring; the resident store is touched load by load, each once
    taken_bytes = 0  # of both
    faulting = 0.0  # seconds that agents spend in page faults or unpack, on cores that the computation then lacks
    granted = False
    shelved: set[tuple[int, int]] = set()  # packed loads that are in memory

    def carry_out(orders: Sequence[Order], time: float) -> None:
        nonlocal disk_free, cores_free, granted, touched_bytes, taken_bytes, faulting
        for order in orders:
            match order:
                case Fetch(_, block, load, offset):
                    new_bytes = slots[block][load]
                    if offset is not None:
                        end = offset + new_bytes
                        new_bytes = max(0, end - touched_bytes)
                        touched_bytes = max(touched_bytes, end)
                    read_bytes, ready = reads[block][load], time
                    if packed and load in packed[block]:
                        if (block, load) in shelved:
                            read_bytes = 0
                        shelved.add((block, load))
                        new_bytes += read_bytes
                    touching = touch_seconds(problem.touch_seconds_per_byte, taken_bytes, new_bytes)
                    taken_bytes += new_bytes
                    if read_bytes:
                        begin = disk_free if disk_free >= time else time + START_SECONDS
                        ready = disk_free = begin + read_bytes / bytes_per_second + touching
                    unpacking = unpacks[block][load]
                    cores_free = max(cores_free, ready) + unpacking
                    slows = problem.unpacking_slows_compute or not read_bytes
                    busy = touching + (unpacking if slows else 0.0)
                    faulting += busy
                    disk.append((cores_free, order, busy))
                case Compute():
                    granted = True

    def settle(until: float, *, waiting: bool) -> None:
        nonlocal faulting
        while disk and disk[0][0] <= until:
            end, order, busy = disk.popleft()
            if waiting:  # nothing was computed that this could slow
                faulting = max(0.0, faulting - busy)
            carry_out(pipeline.on(LoadFetched(order.visit)), end)

    carry_out(pipeline.start(), 0.0)
    ends: list[float] = []
    for number in range(min(max(1, problem.num_passes), SIMULATED_PASSES)):  # a workload of none has a first one, too
        for block, seconds in enumerate(first if number == 0 else later):
            granted = False
            carry_out(pipeline.on(BlockWanted(block)), now)
            while not granted:
                now = max(now, disk[0][0])
                settle(now, waiting=True)
            now += seconds + min(faulting, seconds)
            faulting -= min(faulting, seconds)
            settle(now, waiting=False)
        carry_out(pipeline.on(BlockDone()), now)
        ends.append(now)
    steady = ends[-1] - ends[-2] if len(ends) > 1 else ends[0]
    return Prediction(
        first_pass_seconds=ends[0],
        steady_pass_seconds=steady,
        total_seconds=ends[-1] + steady * (problem.num_passes - len(ends)),
    )


def part_computed(problem: Problem, reads: Sequence[Sequence[int]], resident: Sequence[Set[int]]) -> float:
    """Of the units' seconds, what they take where only what does not stay streams. `reads`: of each block's loads."""
    kept = sum(reads[block][load] for block, loads in enumerate(resident[: len(reads)]) for load in loads)
    streamed = 1.0 - kept / max(1, sum(map(sum, reads)))
    return problem.quiet + (1.0 - problem.quiet) * streamed


def _unpack_seconds(unit: UnitCost) -> Sequence[float]:
    return unit.unpack_seconds or [0.0] * len(unit.slot_bytes)
