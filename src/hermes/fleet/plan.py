"""Quotas, windows and policy of a fleet: few candidates, each predicted, the shortest makespan wins. Pure."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hermes.errors import BudgetError
from hermes.fleet.members import (
    WINDOWS,
    Candidate,
    Window,
    best_bandwidth,
    least_hidden,
    make_member,
    need_of,
    slots_of,
)
from hermes.fleet.predict import FleetPrediction, Member, predict
from hermes.fleet.quota import Need, divide
from hermes.fleet.schedule import POLICIES, Policy
from hermes.plan import Bandwidth, Plan, Problem, simulate
from hermes.units import format_budget, format_bytes

__all__ = ["FleetPlan", "plan_fleet"]

ROUNDS = 4
"""Requests of each model that a candidate is predicted over."""
TILTS = (0.0, 1.0, -0.5)
"""How far models that wait for the disk rather than compute are preferred when bytes are shared out."""
HIDING_WINDOWS = WINDOWS[:4]
"""Windows that `least_hidden` is tried with, each for every number of requests at once."""
PIECE_BYTES = 2**20
"""Reads are multiples of it; two for each agent should fit the window."""


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
        num_agents: Loading Agents, which all engines share.
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
    num_agents: int
    round_seconds: Mapping[Policy, float]
    bound_seconds: float

    def predict(self, requests: Mapping[str, int], *, policy: Policy | None = None) -> FleetPrediction:
        """Of a closed loop of so many requests of each model."""
        return predict(
            self.members,
            requests,
            self.bytes_per_second,
            policy=policy or self.policy,
            max_active=self.max_active,
        )


@dataclass(frozen=True, kw_only=True)
class _Way:
    """Whose turn it is, among how many, and the bytes that leaves for weights."""

    policy: Policy
    max_active: int
    heap_bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Tried:
    way: _Way
    quotas: Mapping[str, int]
    windows: Mapping[str, Window]
    members: Mapping[str, Member]
    seconds: float

    @property
    def pass_bytes(self) -> int:
        return sum(member.pass_bytes for member in self.members.values())


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
    bandwidth = best_bandwidth([b for candidate in candidates.values() for b in candidate.problem.bandwidths])
    free = limit_bytes - margin_bytes - floor_bytes - slack_bytes
    rates = sorted(max(b.bytes_per_second for b in candidate.problem.bandwidths) for candidate in candidates.values())
    rate = rates[len(rates) // 2]
    candidates = {name: _read_by(bandwidth, candidate) for name, candidate in candidates.items()}
    ways = _ways(candidates, free, policy, max_active)
    tried: list[_Tried] = []

    def take(way: _Way, shares: Mapping[str, tuple[int, Window]] | None) -> None:
        if shares is not None:
            tried.append(_try(candidates, way, shares, rate))

    for way in ways:
        take(way, _even(candidates, way, WINDOWS[0], TILTS[0], rate))
    if not tried:
        raise _refusal(candidates, budget_bytes, limit_bytes, free)
    first = min(tried, key=lambda one: one.seconds)
    if first.pass_bytes:
        for window in WINDOWS[1:]:
            take(first.way, _even(candidates, first.way, window, TILTS[0], rate))
        for tilt in TILTS[1:]:
            take(first.way, _even(candidates, first.way, WINDOWS[0], tilt, rate))
        for way, window in itertools.product(ways, HIDING_WINDOWS):
            take(way, least_hidden(candidates, window, way.weight_bytes))
    best = min(tried, key=lambda one: one.seconds)
    return _finish(candidates, best, budget_bytes, limit_bytes, floor_bytes, slack_bytes, rate, bandwidth, policy)


def _read_by(bandwidth: Bandwidth, candidate: Candidate) -> Candidate:
    """Agents are shared: each has a buffer for every model that needs one."""
    return replace(candidate, problem=replace(candidate.problem, bandwidths=(bandwidth,)))


def _ways(
    candidates: Mapping[str, Candidate], free_bytes: int, policy: Policy | None, max_active: int | None
) -> list[_Way]:
    """What is tried. "round-robin" goes round all models, as published, or as many as there is room for."""
    everyone = len(candidates)
    least = sum(need_of(candidate.problem, WINDOWS[0]).least_bytes for candidate in candidates.values())
    ways = []
    for one in reversed(POLICIES):
        if policy in (one, None):
            fitting = []
            for number in range(everyone, 0, -1) if max_active is None else (max_active,):
                heap_bytes = _heap_bytes(candidates, number)
                if least <= free_bytes - heap_bytes:
                    fitting.append(
                        _Way(
                            policy=one,
                            max_active=number,
                            heap_bytes=heap_bytes,
                            weight_bytes=free_bytes - heap_bytes,
                        )
                    )
            if one == "round-robin":
                ways += fitting[:1]
            else:
                ways += [way for way in reversed(fitting) if way.max_active in (1, 2, everyone, max_active)]
    return ways


def _even(
    candidates: Mapping[str, Candidate], way: _Way, window: Window, tilt: float, rate: float
) -> dict[str, tuple[int, Window]] | None:
    """The same window for all, and bytes by importance; None where they do not fit."""
    needs = {name: need_of(candidate.problem, window) for name, candidate in candidates.items()}
    weights = {
        name: candidate.importance
        * (needs[name].most_bytes - needs[name].least_bytes)
        * (max(1, needs[name].most_bytes) / rate / max(candidate.compute_seconds, 1e-6)) ** tilt
        for name, candidate in candidates.items()
    }
    try:
        return {name: (nbytes, window) for name, nbytes in divide(way.weight_bytes, needs, weights).items()}
    except BudgetError:
        return None


def _try(
    candidates: Mapping[str, Candidate],
    way: _Way,
    shares: Mapping[str, tuple[int, Window]],
    rate: float,
) -> _Tried:
    """Predict it; what bytes the shares leave go to all alike first."""
    needs = {name: need_of(candidates[name].problem, window) for name, (_, window) in shares.items()}
    wanted = {
        name: Need(least_bytes=nbytes, most_bytes=max(nbytes, needs[name].most_bytes))
        for name, (nbytes, _) in shares.items()
    }
    room = {name: float(need.most_bytes - need.least_bytes) for name, need in wanted.items()}
    quotas = divide(way.weight_bytes, wanted, room)
    everyone = sum(one.compute_seconds for one in candidates.values())
    members = {
        name: make_member(
            candidate,
            quotas[name],
            shares[name][1],
            rate,
            patience_seconds=candidate.deadline_seconds or everyone / candidate.importance,
        )
        for name, candidate in candidates.items()
    }
    prediction = predict(
        members,
        dict.fromkeys(candidates, ROUNDS),
        rate,
        policy=way.policy,
        max_active=way.max_active,
    )
    return _Tried(
        way=way,
        quotas=quotas,
        windows={name: window for name, (_, window) in shares.items()},
        members=members,
        seconds=prediction.makespan_seconds,
    )


def _heap_bytes(candidates: Mapping[str, Candidate], max_active: int) -> int:
    """One model computes at a time: scratch is taken once, activations by every request under way."""
    scratch = max(candidate.scratch_bytes for candidate in candidates.values())
    held = sorted((candidate.activation_bytes for candidate in candidates.values()), reverse=True)
    return scratch + sum(held[:max_active])


def _refusal(candidates: Mapping[str, Candidate], budget_bytes: int, limit_bytes: int, free_bytes: int) -> BudgetError:
    least = sum(need_of(candidate.problem, WINDOWS[0]).least_bytes for candidate in candidates.values())
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
        name: _plan(candidate.problem, best.members[name], best.quotas[name], best.windows[name][0], rate, bandwidth)
        for name, candidate in candidates.items()
    }
    seconds = {}
    for one in POLICIES if policy is None else (policy,):
        cold, warm = (
            predict(
                best.members,
                dict.fromkeys(candidates, rounds),
                rate,
                policy=one,
                max_active=best.way.max_active,
            )
            for rounds in (ROUNDS, 2 * ROUNDS)
        )
        seconds[one] = (warm.makespan_seconds - cold.makespan_seconds) / ROUNDS
    reading = sum(member.pass_bytes for member in best.members.values()) / rate
    return FleetPlan(
        budget_bytes=budget_bytes,
        limit_bytes=limit_bytes,
        floor_bytes=floor_bytes,
        heap_bytes=best.way.heap_bytes + slack_bytes,
        policy=best.way.policy,
        max_active=best.way.max_active,
        quotas=best.quotas,
        needs={
            name: Need(
                least_bytes=min(best.quotas[name], best.members[name].least_bytes),
                most_bytes=need_of(one.problem, best.windows[name]).most_bytes,
            )
            for name, one in candidates.items()
        },
        plans=plans,
        members=best.members,
        bytes_per_second=rate,
        num_agents=bandwidth.num_agents,
        round_seconds=seconds,
        bound_seconds=max(reading, sum(candidate.compute_seconds for candidate in candidates.values())),
    )


def _plan(
    problem: Problem, member: Member, quota_bytes: int, granularity: str, rate: float, bandwidth: Bandwidth
) -> Plan:
    slots = slots_of(problem, granularity)
    resident = tuple(frozenset(loads) for loads in member.resident)
    alone = simulate(problem, problem.groups[granularity][: len(member.slots)], resident, member.ring_bytes, rate)
    kept = sum(slots[block][load] for block, loads in enumerate(resident) for load in loads)
    compute = sum(member.block_seconds)
    reading = member.pass_bytes / rate
    fitting = member.ring_bytes // (2 * bandwidth.num_agents)
    return Plan(
        budget_bytes=quota_bytes,
        limit_bytes=quota_bytes,
        granularity=granularity,
        num_agents=bandwidth.num_agents,
        piece_bytes=min(bandwidth.piece_bytes, max(PIECE_BYTES, fitting // PIECE_BYTES * PIECE_BYTES)),
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
