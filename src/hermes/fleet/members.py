"""A model as the planner tries it: its quota, window, and the weights that stay. Pure."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from hermes.fleet.predict import Member
from hermes.fleet.quota import Need
from hermes.pipeload import smallest_ring
from hermes.plan import Bandwidth, Problem, part_computed, spread, spread_over

__all__ = [
    "WINDOWS",
    "Candidate",
    "Window",
    "best_bandwidth",
    "least_hidden",
    "make_member",
    "need_of",
    "slots_of",
]

Window = tuple[str, float]
"""Granularity, and bytes in smallest windows."""
WINDOWS: tuple[Window, ...] = (
    ("joined", 1.0), ("joined", 1.5), ("joined", 2.0), ("joined", 3.0), ("joined", 4.0), ("joined", 6.0),
    ("leaf", 1.0), ("half", 1.0), ("layer", 1.0),
)  # fmt: skip
AS_FAST = 0.9
MOST_KEPT = 12
"""Blocks that may stay for the sake of a smaller window."""
SMALLEST_RING_BYTES = 8 * 2**20
"""In less, reads get so short that each one's own cost shows."""
SMALL_BYTES = 2**20 + 8192
"""Loads up to this, a MiB and what aligns it, cost the cores more by being read than by their bytes."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model as the fleet's planner sees it.

    Attributes:
        problem: its costs.
        activation_bytes: what a request holds besides weights while it is under way.
        scratch_bytes: what computing a block takes besides; of one model at a time.
        importance: weight when bytes are shared out; and its requests are due sooner by this factor.
        deadline_seconds: after arrival; None: by importance.
        resident_bytes: weights that may stay between requests, besides blocks that no window has room for; the rest of
            the quota is window, as SwapNet's blocks fill it. None: what is best.
    """

    problem: Problem
    activation_bytes: int
    scratch_bytes: int = 0
    importance: float = 1.0
    deadline_seconds: float | None = None
    resident_bytes: int | None = None

    @property
    def compute_seconds(self) -> float:
        """Of one pass."""
        return sum(unit.next_seconds for unit in self.problem.units[: self.problem.num_in_pass or None])


def slots_of(problem: Problem, granularity: str) -> list[list[int]]:
    """For each block the slot bytes of its loads."""
    return [[n for unit in block for n in problem.units[unit].slot_bytes] for block in problem.groups[granularity]]


def best_bandwidth(bandwidths: Sequence[Bandwidth]) -> Bandwidth:
    """That of the fewest agents that read about as fast as any: each one that wakes takes time from who computes."""
    best = max(b.bytes_per_second for b in bandwidths)
    return min(
        (b for b in bandwidths if b.bytes_per_second >= AS_FAST * best),
        key=lambda b: (b.num_agents, -b.bytes_per_second),
    )


def need_of(problem: Problem, window: Window) -> Need:
    """Least: pinned, buffers, a window and what has no room in it, or everything where that is less."""
    slots = slots_of(problem, window[0])
    fixed = _fixed_bytes(problem)
    total = sum(map(sum, slots))
    least = min(one.kept_bytes + one.ring_bytes for one in _rings(slots, window))
    return Need(least_bytes=fixed + min(least, total), most_bytes=fixed + total)


def make_member(
    candidate: Candidate, quota_bytes: int, window: Window, rate: float, *, patience_seconds: float
) -> Member:
    """The model with this quota, which is its least or more.

    What stays are first the few blocks that would need a larger window than all others, as far as there is room: every
    byte of the window is read again in each pass. Then small loads, because each read takes time from who computes,
    whatever its size. Then those that take longer to read from a disk of this `rate` than
    to compute: the others hide behind their own computing. Where all or none do, the same share of each stays.
    """
    problem = candidate.problem
    slots = slots_of(problem, window[0])
    fixed, total = _fixed_bytes(problem), sum(map(sum, slots))
    free = quota_bytes - fixed
    in_pass = problem.num_in_pass or len(problem.units)
    groups = [block for block in problem.groups[window[0]] if block[0] < in_pass]
    seconds = _seconds_of(problem, groups)
    allowed = candidate.resident_bytes if (candidate.resident_bytes or 0) < total else None
    rings = _rings(slots, window if allowed is None else (window[0], 1.0))  # that one is widened
    fitting = [one for one in rings if one.kept_bytes + one.ring_bytes <= free]
    if free >= total and (allowed is None or not fitting):
        ring = _Ring(kept=frozenset(), kept_bytes=total, ring_bytes=0)  # without a window nothing can be lent
        resident = spread(slots, total)
    else:
        ring = min(fitting, key=lambda one: one.ring_bytes) if allowed is None else _widest(fitting[0], free - allowed)
        rest = [() if number in ring.kept else loads for number, loads in enumerate(slots)]
        resident = _resident(rest, seconds, free - ring.ring_bytes - ring.kept_bytes, rate)
        for number in ring.kept:
            resident[number] = frozenset(range(len(slots[number])))
    reads = [[n for unit in block for n in problem.units[unit].read_bytes] for block in groups]
    share = part_computed(problem, reads, resident)
    return Member(
        slots=slots[: len(groups)],
        reads=reads,
        block_seconds=[problem.boundary_seconds + share * one for one in seconds],
        resident=resident,
        ring_bytes=ring.ring_bytes,
        least_bytes=fixed + ring.kept_bytes + ring.ring_bytes,
        patience_seconds=patience_seconds,
    )


def least_hidden(
    candidates: Mapping[str, Candidate], window: Window, budget_bytes: int
) -> dict[str, tuple[int, Window]] | None:
    """Bytes of each model where those blocks stay, whoever's they are, that have the least to compute for their bytes.

    The disk hides behind what the others compute. By importance; None where the least do not fit.
    """
    needs = {name: need_of(candidate.problem, window) for name, candidate in candidates.items()}
    quotas = {name: need.least_bytes for name, need in needs.items()}
    left = budget_bytes - sum(quotas.values())
    if left < 0:
        return None
    blocks: list[tuple[float, str, int]] = []
    for name, candidate in candidates.items():
        problem = candidate.problem
        sizes = map(sum, slots_of(problem, window[0]))
        for nbytes, seconds in zip(sizes, _seconds_of(problem, problem.groups[window[0]]), strict=True):
            blocks.append((seconds / max(1, nbytes) / candidate.importance, name, nbytes))
    for _, name, nbytes in sorted(blocks):
        more = min(nbytes, needs[name].most_bytes - quotas[name], left)
        quotas[name] += more
        left -= more
    return {name: (nbytes, window) for name, nbytes in quotas.items()}


def _resident(
    slots: Sequence[Sequence[int]], seconds: Sequence[float], budget_bytes: int, rate: float
) -> list[frozenset[int]]:
    late = [number < len(seconds) and sum(loads) > seconds[number] * rate for number, loads in enumerate(slots)]
    groups: list[list[set[int]]] = [[set() for _ in slots] for _ in range(3)]
    for block, loads in enumerate(slots):
        for load, nbytes in enumerate(loads):
            groups[0 if nbytes <= SMALL_BYTES else 1 if late[block] else 2][block].add(load)
    kept: list[Set[int]] = [frozenset() for _ in slots]
    for group in groups:
        chosen = spread_over([frozenset(loads) for loads in group], slots, max(0, budget_bytes))
        budget_bytes -= sum(slots[block][load] for block, loads in enumerate(chosen) for load in loads)
        kept = [had | new for had, new in zip(kept, chosen, strict=True)]
    return [frozenset(loads) for loads in kept]


def _seconds_of(problem: Problem, blocks: Sequence[Sequence[int]]) -> list[float]:
    """What each computes in a pass."""
    return [sum(problem.units[unit].next_seconds for unit in block) for block in blocks]


def _fixed_bytes(problem: Problem) -> int:
    return problem.pinned_bytes + best_bandwidth(problem.bandwidths).num_agents * problem.buffer_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ring:
    """A window, and the blocks that are too large for it and stay."""

    kept: frozenset[int]
    kept_bytes: int
    ring_bytes: int


def _widest(ring: _Ring, nbytes: int) -> _Ring:
    """With all of these bytes that are not kept for its sake."""
    return replace(ring, ring_bytes=max(ring.ring_bytes, (nbytes - ring.kept_bytes) // 4096 * 4096))


def _rings(slots: Sequence[Sequence[int]], window: Window) -> list[_Ring]:
    """Windows that can be had for a model, the largest first: all its blocks pass through, or all but the largest."""
    order = sorted(range(len(slots)), key=lambda number: -smallest_ring([slots[number]]))
    found: list[_Ring] = []
    for count, number in enumerate(order[: MOST_KEPT + 1]):
        smallest = smallest_ring([slots[number]])
        if found and smallest < SMALLEST_RING_BYTES:
            break
        found.append(
            _Ring(
                kept=frozenset(order[:count]),
                kept_bytes=sum(sum(slots[block]) for block in order[:count]),
                ring_bytes=max(smallest, int(smallest * window[1]) // 4096 * 4096),
            )
        )
    return found or [_Ring(kept=frozenset(), kept_bytes=0, ring_bytes=0)]
