"""Quotas, windows and policy of a fleet: few candidates, each predicted, the shortest makespan wins. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hermes.errors import BudgetError
from hermes.fleet.predict import FleetPrediction, Member, predict
from hermes.fleet.quota import Need, divide
from hermes.fleet.schedule import POLICIES, Policy
from hermes.pipeload import smallest_ring
from hermes.plan import Bandwidth, Plan, Problem, simulate, spread
from hermes.units import format_budget, format_bytes

__all__ = ["Candidate", "FleetPlan", "plan_fleet"]

ROUNDS = 3
"""Requests of each model that a candidate is predicted over."""
WINDOWS: tuple[tuple[str, float], ...] = (
    ("leaf", 1.0), ("leaf", 1.5), ("leaf", 2.0), ("leaf", 3.0), ("half", 1.0), ("layer", 1.0)
)  # fmt: skip
"""Granularity, and windows in smallest windows, that are tried; the same for every model."""
TILTS = (0.0, 1.0, -0.5)
"""How far models that wait for the disk rather than compute are preferred when bytes are shared out."""
PIECE_BYTES = 2**20
"""Reads are multiples of it; two for each agent should fit the window."""
WORTH_SWITCHING = 0.98


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model as the fleet's planner sees it.

    Attributes:
        problem: its costs.
        activation_bytes: what a request takes besides weights while it is under way.
        importance: weight when bytes are shared out; and its requests are due sooner by this factor.
        deadline_seconds: after arrival; None: by importance.
    """

    problem: Problem
    activation_bytes: int
    importance: float = 1.0
    deadline_seconds: float | None = None

    @property
    def compute_seconds(self) -> float:
        """Of one pass."""
        return sum(unit.next_seconds for unit in self.problem.units[: self.problem.num_in_pass or None])


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """How several models share a budget, and what that is predicted to cost.

    Attributes:
        budget_bytes: what was asked.
        limit_bytes: the budget or a cgroup's limit, the tighter one.
        floor_bytes: the process before any weight.
        heap_bytes: activations of the requests that may be under way at once, and slack.
        policy: of the turns.
        max_active: requests under way at once.
        quotas: bytes for weights, by model; windows, resident weights and buffers come out of it.
        plans: each model's own, within its quota.
        members: the same for predictions.
        bytes_per_second: of the disk.
        num_reads: at a time.
        round_seconds: predicted of a steady round, one request of each model, for each policy that was tried.
        bound_seconds: of such a round: what computing takes, or reading what must be read again; the longer.
    """

    budget_bytes: int
    limit_bytes: int
    floor_bytes: int
    heap_bytes: int
    policy: Policy
    max_active: int
    quotas: Mapping[str, int]
    needs: Mapping[str, Need]
    plans: Mapping[str, Plan]
    members: Mapping[str, Member]
    bytes_per_second: float
    num_reads: int
    round_seconds: Mapping[Policy, float]
    bound_seconds: float

    def predict(self, requests: Mapping[str, int], *, policy: Policy | None = None) -> FleetPrediction:
        """Of a closed loop of so many requests of each model."""
        return predict(
            self.members, requests, self.bytes_per_second, policy=policy or self.policy, max_active=self.max_active
        )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    window: tuple[str, float]
    tilt: float
    max_active: int


@dataclass(frozen=True, kw_only=True)
class _Tried:
    choice: _Choice
    policy: Policy
    heap_bytes: int
    quotas: Mapping[str, int]
    needs: Mapping[str, Need]
    members: Mapping[str, Member]
    seconds: float


def plan_fleet(
    candidates: Mapping[str, Candidate],
    *,
    budget_bytes: int,
    limit_bytes: int,
    margin_bytes: int,
    floor_bytes: int,
    slack_bytes: int,
    policy: Policy | None = None,
    max_active: int | None = None,
) -> FleetPlan:
    """The plan with the shortest predicted round; `policy` and `max_active` are kept where they are given.

    Args:
        candidates: the models, by name.
        budget_bytes: what the user asked.
        limit_bytes: the budget or a tighter limit of the system's.
        margin_bytes: part of the limit that is not planned with.
        floor_bytes: the process before any weight.
        slack_bytes: of heap, besides activations.
        policy: of the turns, else the better one.
        max_active: requests under way at once, else what is best.

    Raises:
        BudgetError: with the smallest budget that works.
    """
    bandwidth = max(
        (b for candidate in candidates.values() for b in candidate.problem.bandwidths),
        key=lambda b: b.bytes_per_second,
    )
    free = limit_bytes - margin_bytes - floor_bytes - slack_bytes
    rates = sorted(max(b.bytes_per_second for b in candidate.problem.bandwidths) for candidate in candidates.values())
    rate = rates[len(rates) // 2]
    best: _Tried | None = None
    choice = _Choice(window=WINDOWS[0], tilt=TILTS[0], max_active=max_active or len(candidates))
    actives = [max_active] if max_active else sorted({len(candidates), min(2, len(candidates)), 1}, reverse=True)
    for options in (
        [{"max_active": number} for number in actives],
        [{"window": window} for window in WINDOWS],
        [{"tilt": tilt} for tilt in TILTS],
    ):
        start = best.choice if best is not None else choice
        for option in options:
            for one in _try(candidates, replace(start, **option), free, rate, policy):
                if best is None or one.seconds < WORTH_SWITCHING * best.seconds:
                    best = one
    if best is None:
        raise _refusal(candidates, budget_bytes, limit_bytes, free)
    return _finish(candidates, best, budget_bytes, limit_bytes, floor_bytes, slack_bytes, rate, bandwidth, policy)


def _try(
    candidates: Mapping[str, Candidate], choice: _Choice, free_bytes: int, rate: float, policy: Policy | None
) -> Iterator[_Tried]:
    heap_bytes = _heap_bytes(candidates, choice.max_active)
    needs = {name: _need(candidate.problem, choice.window) for name, candidate in candidates.items()}
    weights = {
        name: candidate.importance
        * (needs[name].most_bytes - needs[name].least_bytes)
        * (needs[name].most_bytes / rate / max(candidate.compute_seconds, 1e-6)) ** choice.tilt
        for name, candidate in candidates.items()
    }
    try:
        quotas = divide(free_bytes - heap_bytes, needs, weights)
    except BudgetError:
        return
    members = {name: _member(candidates, name, quotas[name], choice.window) for name in candidates}
    requests = dict.fromkeys(candidates, ROUNDS)
    for one in POLICIES if policy is None else (policy,):
        prediction = predict(members, requests, rate, policy=one, max_active=choice.max_active)
        yield _Tried(
            choice=choice,
            policy=one,
            heap_bytes=heap_bytes,
            quotas=quotas,
            needs=needs,
            members=members,
            seconds=prediction.makespan_seconds,
        )


def _heap_bytes(candidates: Mapping[str, Candidate], max_active: int) -> int:
    return sum(sorted((candidate.activation_bytes for candidate in candidates.values()), reverse=True)[:max_active])


def _slots(problem: Problem, granularity: str) -> list[list[int]]:
    return [[n for unit in block for n in problem.units[unit].slot_bytes] for block in problem.groups[granularity]]


def _need(problem: Problem, window: tuple[str, float]) -> Need:
    """Least: pinned, buffers and the window, or everything where that is less."""
    slots = _slots(problem, window[0])
    fixed = problem.pinned_bytes + _num_agents(problem) * problem.buffer_bytes
    total = sum(map(sum, slots))
    ring_bytes = int(smallest_ring(slots) * window[1]) // 4096 * 4096
    return Need(least_bytes=fixed + min(ring_bytes, total), most_bytes=fixed + total)


def _num_agents(problem: Problem) -> int:
    return max(problem.bandwidths, key=lambda b: b.bytes_per_second).num_agents


def _member(candidates: Mapping[str, Candidate], name: str, quota_bytes: int, window: tuple[str, float]) -> Member:
    candidate = candidates[name]
    problem = candidate.problem
    slots = _slots(problem, window[0])
    fixed = problem.pinned_bytes + _num_agents(problem) * problem.buffer_bytes
    total, free = sum(map(sum, slots)), quota_bytes - fixed
    ring_bytes = max(smallest_ring(slots), int(smallest_ring(slots) * window[1]) // 4096 * 4096)
    if free >= total:
        resident, ring_bytes = spread(slots, total), min(ring_bytes, free - total)
    else:
        resident = spread(slots, free - ring_bytes)
    in_pass = problem.num_in_pass or len(problem.units)
    groups = [block for block in problem.groups[window[0]] if block[0] < in_pass]
    everyone = sum(one.compute_seconds for one in candidates.values())
    return Member(
        slots=slots[: len(groups)],
        reads=[[n for unit in block for n in problem.units[unit].read_bytes] for block in groups],
        block_seconds=[sum(problem.units[unit].next_seconds for unit in block) for block in groups],
        resident=resident,
        ring_bytes=ring_bytes,
        patience_seconds=candidate.deadline_seconds or everyone / candidate.importance,
    )


def _refusal(candidates: Mapping[str, Candidate], budget_bytes: int, limit_bytes: int, free_bytes: int) -> BudgetError:
    least = sum(_need(candidate.problem, WINDOWS[0]).least_bytes for candidate in candidates.values())
    minimum = limit_bytes - free_bytes + _heap_bytes(candidates, 1) + least
    return BudgetError(
        f"{len(candidates)} models need {format_bytes(minimum)}, {format_bytes(least)} of it for their smallest "
        f"windows; the limit is {format_bytes(min(limit_bytes, budget_bytes))}; try --budget {format_budget(minimum)}",
        minimum_bytes=minimum,
    )


def _finish(
    candidates: Mapping[str, Candidate],
    best: _Tried,
    budget_bytes: int,
    limit_bytes: int,
    floor_bytes: int,
    slack_bytes: int,
    rate: float,
    bandwidth: Bandwidth,
    policy: Policy | None,
) -> FleetPlan:
    plans = {
        name: _plan(candidate.problem, best.members[name], best.quotas[name], best.choice.window[0], rate, bandwidth)
        for name, candidate in candidates.items()
    }
    seconds = {}
    for one in POLICIES if policy is None else (policy,):
        cold, warm = (
            predict(
                best.members, dict.fromkeys(candidates, rounds), rate, policy=one, max_active=best.choice.max_active
            ).makespan_seconds
            for rounds in (ROUNDS, 2 * ROUNDS)
        )
        seconds[one] = (warm - cold) / ROUNDS
    reading = sum(member.pass_bytes for member in best.members.values()) / rate
    return FleetPlan(
        budget_bytes=budget_bytes,
        limit_bytes=limit_bytes,
        floor_bytes=floor_bytes,
        heap_bytes=best.heap_bytes + slack_bytes,
        policy=best.policy,
        max_active=best.choice.max_active,
        quotas=best.quotas,
        needs=best.needs,
        plans=plans,
        members=best.members,
        bytes_per_second=rate,
        num_reads=bandwidth.num_agents,
        round_seconds=seconds,
        bound_seconds=max(reading, sum(candidate.compute_seconds for candidate in candidates.values())),
    )


def _plan(
    problem: Problem, member: Member, quota_bytes: int, granularity: str, rate: float, bandwidth: Bandwidth
) -> Plan:
    slots = _slots(problem, granularity)
    resident = tuple(frozenset(loads) for loads in member.resident)
    alone = simulate(problem, problem.groups[granularity][: len(member.slots)], resident, member.ring_bytes, rate)
    kept = sum(slots[block][load] for block, loads in enumerate(resident) for load in loads)
    compute = sum(member.block_seconds)
    reading, num_agents = member.pass_bytes / rate, _num_agents(problem)
    return Plan(
        budget_bytes=quota_bytes,
        limit_bytes=quota_bytes,
        granularity=granularity,
        num_agents=num_agents,
        piece_bytes=min(
            bandwidth.piece_bytes, max(PIECE_BYTES, member.ring_bytes // (2 * num_agents) // PIECE_BYTES * PIECE_BYTES)
        ),
        ring_bytes=member.ring_bytes,
        resident=resident,
        resident_bytes=kept,
        pass_bytes=member.pass_bytes,
        first_pass_seconds=alone.first_pass_seconds,
        steady_pass_seconds=alone.steady_pass_seconds,
        total_seconds=alone.total_seconds,
        peak_bytes=problem.pinned_bytes + kept + (member.ring_bytes if member.pass_bytes else 0),
        floor_bytes=0,
        heap_bytes=0,
        pinned_bytes=problem.pinned_bytes,
        bound="disk" if reading > compute else "compute",
        bound_seconds=max(reading, compute),
    )
