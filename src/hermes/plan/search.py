"""The search: every granularity, a ladder of windows, and all that is left as resident bytes; the fastest wins."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hermes.errors import BudgetError, InputError
from hermes.pipeload import smallest_ring
from hermes.plan.cost import Prediction, least_seconds, simulate, streamed_reads
from hermes.plan.problem import Bandwidth, Plan, Problem
from hermes.plan.residency import spread, spread_over
from hermes.units import format_budget, format_bytes

__all__ = ["choose_bandwidth", "make_plan", "smallest_budget"]

GOOD_ENOUGH = 0.7
"""Rates within this share of the best are one rate, measured several times on a disk that is never quite steady."""
AS_GOOD = 0.9
"""More agents must reach this share of the best: on some virtual disks each further read slows the others down."""
SMALLEST_PIECE_BYTES = 2**20
WORTH_CHANGING = 0.99
"""A larger window or block must be so much faster: small ones leave more in the processor's caches."""
WINDOW_LADDER = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Windows that are tried, in smallest windows: of some blocks the smallest holds but one, so that nothing is ahead."""
PACKED_SHARES = (0.5, 1.0)
"""Of the bytes that may stay, kept packed: where weights are, and where unpacking keeps up with what it saves."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What stays in memory: a window, weights, and packed weights."""

    ring_bytes: int
    resident: list[frozenset[int]]
    packed: list[frozenset[int]]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    granularity: str
    layout: _Layout
    prediction: Prediction


def smallest_budget(problem: Problem, margin_bytes: int, **choices: Any) -> int:
    """The smallest budget that `make_plan` takes with these choices, in bytes: what its refusal says."""
    try:
        make_plan(problem, budget_bytes=1, limit_bytes=1, margin_bytes=margin_bytes, **choices)
    except BudgetError as error:
        if error.minimum_bytes is not None:
            return error.minimum_bytes
        raise
    return 1


def make_plan(
    problem: Problem,
    *,
    budget_bytes: int,
    limit_bytes: int,
    margin_bytes: int,
    num_agents: int | None = None,
    granularity: str | None = None,
    resident_bytes: int | None = None,
    sequential: bool = False,
) -> Plan:
    """The plan with the shortest predicted time; the arguments that are given are kept.

    Args:
        problem: costs.
        budget_bytes: what the user asked.
        limit_bytes: the budget or a tighter limit of the system's.
        margin_bytes: part of the limit that is not planned with.
        num_agents: Loading Agents, else as many as reach a good rate and whose buffers fit.
        granularity: "leaf", "joined", "half" or "layer", else the fastest.
        resident_bytes: weights that stay in memory, else as many as fit.
        sequential: load and compute in turns.

    Raises:
        BudgetError: with the smallest budget that works.
        InputError: an argument is too small, or there is no such granularity.
    """
    if num_agents is not None and num_agents < 1:
        raise InputError(f"num_agents {num_agents} must be 1 or more")
    if granularity is not None and granularity not in problem.groups:
        raise InputError(f"unknown granularity {granularity!r}; choose {', '.join(problem.groups)}")
    if resident_bytes is not None and resident_bytes < 0:
        raise InputError(f"resident_bytes {resident_bytes} must be 0 or more; 0 streams every block")
    groups = {name: blocks for name, blocks in problem.groups.items() if granularity in (None, name)}
    fixed = 0
    for bandwidth in _bandwidths(problem.bandwidths, num_agents):
        fixed = _fixed_bytes(problem, bandwidth.num_agents)
        free = limit_bytes - margin_bytes - fixed
        best = _fastest(problem, groups, bandwidth, free, resident_bytes, sequential)
        if best is not None:
            return _finish(problem, best, bandwidth, budget_bytes, limit_bytes, fixed, sequential)
    weights = min(_fewest_bytes(_slots(problem, blocks), resident_bytes) for blocks in groups.values())
    minimum = max(fixed + weights + margin_bytes, problem.preparing_bytes)
    if limit_bytes < budget_bytes:
        raise BudgetError(
            f"the cgroup's limit of {format_bytes(limit_bytes)} is below the {format_bytes(minimum)} "
            f"that this model needs; raise the limit",
            minimum_bytes=minimum,
        )
    raise BudgetError(
        f"the budget of {format_bytes(budget_bytes)} is too small: {format_bytes(problem.floor_bytes)} for the "
        f"process, {format_bytes(problem.heap_bytes)} for activations and cache, "
        f"{format_bytes(problem.pinned_bytes)} pinned, {format_bytes(weights)} window; "
        f"try --budget {format_budget(minimum)}",
        minimum_bytes=minimum,
    )


def _fastest(
    problem: Problem,
    groups: Mapping[str, Sequence[Sequence[int]]],
    bandwidth: Bandwidth,
    free_bytes: int,
    resident_bytes: int | None,
    sequential: bool,
) -> _Candidate | None:
    best: _Candidate | None = None
    once = problem.num_passes == 1
    tried: list[Sequence[Sequence[int]]] = []
    for name, blocks in groups.items():
        if blocks in tried:
            continue
        tried.append(blocks)
        in_pass = _in_pass(problem, blocks)
        for layout in _layouts(problem, blocks, free_bytes, resident_bytes, once):
            rate = problem.rate_into(layout.ring_bytes, bandwidth.bytes_per_second)
            if best is not None:
                least = least_seconds(problem, in_pass, layout.resident, rate, layout.packed)
                if least >= WORTH_CHANGING * best.prediction.total_seconds:
                    continue
            prediction = simulate(
                problem,
                in_pass,
                layout.resident,
                layout.ring_bytes,
                rate,
                ahead=not sequential,
                packed=layout.packed,
            )
            if best is None or prediction.total_seconds < WORTH_CHANGING * best.prediction.total_seconds:
                best = _Candidate(granularity=name, layout=layout, prediction=prediction)
    return best


def _finish(
    problem: Problem,
    best: _Candidate,
    bandwidth: Bandwidth,
    budget_bytes: int,
    limit_bytes: int,
    fixed_bytes: int,
    sequential: bool,
) -> Plan:
    blocks = problem.groups[best.granularity]
    slots, reads, layout = _slots(problem, blocks), _reads(problem, blocks), best.layout
    kept = sum(slots[block][load] for block, loads in enumerate(layout.resident) for load in loads)
    packed = sum(reads[block][load] for block, loads in enumerate(layout.packed) for load in loads)
    streamed = streamed_reads(_reads(problem, _in_pass(problem, blocks)), layout.resident, layout.packed)
    disk_seconds = sum(streamed) / problem.rate_into(layout.ring_bytes, bandwidth.bytes_per_second)
    compute_seconds = sum(
        unit.next_seconds * problem.quiet if problem.num_passes > 1 else unit.first_seconds
        for unit in problem.units[: problem.num_in_pass]
    )
    ring_used = layout.ring_bytes if streamed or packed else 0
    return Plan(
        budget_bytes=budget_bytes,
        limit_bytes=limit_bytes,
        granularity=best.granularity,
        num_agents=bandwidth.num_agents,
        piece_bytes=_piece_bytes(bandwidth, layout.ring_bytes),
        ring_bytes=layout.ring_bytes,
        resident=tuple(layout.resident),
        resident_bytes=kept,
        packed=tuple(layout.packed),
        packed_bytes=packed,
        pass_bytes=sum(streamed),
        first_pass_seconds=best.prediction.first_pass_seconds,
        steady_pass_seconds=best.prediction.steady_pass_seconds,
        total_seconds=best.prediction.total_seconds,
        peak_bytes=fixed_bytes + ring_used + kept + packed,
        floor_bytes=problem.floor_bytes,
        heap_bytes=problem.heap_bytes,
        pinned_bytes=problem.pinned_bytes,
        bound="disk" if disk_seconds > compute_seconds else "compute",
        bound_seconds=max(disk_seconds, compute_seconds),
        sequential=sequential,
    )


def _layouts(
    problem: Problem,
    blocks: Sequence[Sequence[int]],
    free_bytes: int,
    resident_bytes: int | None,
    once: bool,
) -> Iterator[_Layout]:
    """Every window with what stays beside it; where weights are packed, also with a part of that kept packed."""
    slots, reads = _slots(problem, blocks), _reads(problem, blocks)
    packed_loads = [_packed(problem, block) for block in blocks]
    packs = resident_bytes is None and not once and any(packed_loads)
    for ring_bytes, resident in _windows(slots, free_bytes, resident_bytes, once):
        yield _Layout(ring_bytes=ring_bytes, resident=resident, packed=[])
        if packs and any(len(kept) < len(loads) for kept, loads in zip(resident, slots, strict=True)):
            left_bytes = free_bytes - ring_bytes
            for share in PACKED_SHARES:
                packed = spread_over(packed_loads, reads, int(share * left_bytes))
                packed_bytes = sum(reads[block][load] for block, loads in enumerate(packed) for load in loads)
                others = [frozenset(range(len(loads))) - packed[block] for block, loads in enumerate(slots)]
                resident = spread_over(others, slots, left_bytes - packed_bytes)
                yield _Layout(ring_bytes=ring_bytes, resident=resident, packed=packed)


def _packed(problem: Problem, block: Sequence[int]) -> frozenset[int]:
    """Loads of a block that are unpacked when they have been read."""
    units = [problem.units[unit] for unit in block]
    seconds = [s for unit in units for s in unit.unpack_seconds or [0.0] * len(unit.slot_bytes)]
    return frozenset(load for load, s in enumerate(seconds) if s)


def _windows(
    slots: Sequence[Sequence[int]], free_bytes: int, resident_bytes: int | None, once: bool
) -> Iterator[tuple[int, list[frozenset[int]]]]:
    """Pairs of window and resident loads that fit into `free_bytes` together.

    With `once`, also with nothing resident: what is kept for no later pass only costs memory to touch.
    """
    total = _total_bytes(slots)
    smallest = smallest_ring(slots)
    if resident_bytes is None and free_bytes >= total:
        yield min(smallest, free_bytes - total), spread(slots, total)
        if not once:
            return
    for step in WINDOW_LADDER:
        ring_bytes = max(smallest, min(int(smallest * step) // 4096 * 4096, total))
        left_bytes = free_bytes - ring_bytes
        kept_bytes = left_bytes if resident_bytes is None else min(resident_bytes, total)
        if not 0 <= kept_bytes <= left_bytes:
            return
        if resident_bytes is None and once:
            yield ring_bytes, spread(slots, 0)
        if resident_bytes is not None or free_bytes < total:
            yield ring_bytes, spread(slots, kept_bytes)
        if ring_bytes >= total:
            return


def _fewest_bytes(slots: Sequence[Sequence[int]], resident_bytes: int | None = None) -> int:
    """Window and resident weights at least: streaming can need more than keeping all, if one block is most of it."""
    if resident_bytes is None:
        return min(smallest_ring(slots), _total_bytes(slots))
    return smallest_ring(slots) + min(resident_bytes, _total_bytes(slots))


def _total_bytes(slots: Sequence[Sequence[int]]) -> int:
    return sum(sum(loads) for loads in slots)


def _bandwidths(bandwidths: Sequence[Bandwidth], num_agents: int | None) -> list[Bandwidth]:
    """What is tried, in order: the best choice, then (where the number is free) ever fewer agents and buffers."""
    chosen = choose_bandwidth(bandwidths, num_agents)
    if num_agents is not None:
        return [chosen]
    fewer = [b for b in bandwidths if b.num_agents < chosen.num_agents]
    return [chosen, *sorted(fewer, key=lambda b: (-b.num_agents, -b.bytes_per_second))]


def choose_bandwidth(bandwidths: Sequence[Bandwidth], num_agents: int | None = None) -> Bandwidth:
    """Of the settings that are as good as the best the one with most agents, at the median of the good rates.

    The rate of one agent alone is the first to fall when others use the disk. For a number of agents that was never
    measured it is the nearest one's rate.
    """
    if num_agents is not None:
        nearest = min(bandwidths, key=lambda b: (abs(b.num_agents - num_agents), -b.bytes_per_second))
        return replace(nearest, num_agents=num_agents)
    best = max(b.bytes_per_second for b in bandwidths)
    good = [b.bytes_per_second for b in bandwidths if b.bytes_per_second >= GOOD_ENOUGH * best]
    chosen = max(
        (b for b in bandwidths if b.bytes_per_second >= AS_GOOD * best),
        key=lambda b: (b.num_agents, b.bytes_per_second),
    )
    return replace(chosen, bytes_per_second=statistics.median(good))


def _piece_bytes(bandwidth: Bandwidth, ring_bytes: int) -> int:
    """As measured, or less: two pieces for each agent should fit the window, or agents idle while one ends a load."""
    fitting = ring_bytes // (2 * bandwidth.num_agents)
    return min(bandwidth.piece_bytes, max(SMALLEST_PIECE_BYTES, 1 << max(0, fitting.bit_length() - 1)))


def _slots(problem: Problem, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[n for unit in block for n in problem.units[unit].slot_bytes] for block in blocks]


def _reads(problem: Problem, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[n for unit in block for n in problem.units[unit].read_bytes] for block in blocks]


def _in_pass(problem: Problem, blocks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    return [block for block in blocks if block[0] < problem.num_in_pass]


def _fixed_bytes(problem: Problem, num_agents: int) -> int:
    return problem.floor_bytes + problem.heap_bytes + problem.pinned_bytes + num_agents * problem.buffer_bytes
