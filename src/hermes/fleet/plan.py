"""Quotas, windows and policy of a fleet: few candidates, each predicted, the shortest makespan wins. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hermes.errors import BudgetError
from hermes.fleet.predict import FleetPrediction, Member, predict
from hermes.fleet.quota import Need, divide
from hermes.fleet.schedule import POLICIES, Policy
from hermes.pipeload import smallest_ring
from hermes.plan import Plan, Problem
from hermes.plan.residency import spread
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
    round_seconds: Mapping[str, float]
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
    rates = sorted(
        max(b.bytes_per_second for b in candidate.problem.bandwidths) for candidate in candidates.values()
    )
    rate = rates[len(rates) // 2]
    tried: dict[_Choice, list[_Tried]] = {}

    def attempt(choice: _Choice) -> None:
        if choice not in tried:
            tried[choice] = list(_try(candidates, choice, free, rate, policy))

    actives = [max_active] if max_active else [len(candidates), *range(len(candidates) - 1, 0, -1)][:3] + [1]
    best: _Tried | None = None
    for change in ("start", "window", "max_active", "tilt", "window"):
        base = best.choice if best else _Choice(window=WINDOWS[2], tilt=TILTS[0], max_active=actives[0])
        if change == "start" or best is None:
            choices = [replace(base, max_active=number, window=w) for number in actives for w in (WINDOWS[2], WINDOWS[0])]
        elif change == "window":
            choices = [replace(base, window=window) for window in WINDOWS]
        elif change == "tilt":
            choices = [replace(base, tilt=tilt) for tilt in TILTS]
        else:
            choices = [replace(base, max_active=number) for number in actives]
        for choice in choices:
            attempt(choice)
            for one in tried[choice]:
                if best is None or one.seconds < WORTH_SWITCHING * best.seconds:
                    best = one
    if best is None:
        raise _refusal(candidates, actives[-1], budget_bytes, limit_bytes - free, limit_bytes)
    return _finish(
        candidates, best, tried[best.choice], budget_bytes, limit_bytes, floor_bytes, slack_bytes, rate, bandwidth
    )
