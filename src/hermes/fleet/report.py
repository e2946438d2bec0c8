"""What a fleet has done, beside what was predicted: frozen records. How they look is `hermes.report.fleet`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hermes.fleet.plan import FleetPlan
from hermes.fleet.worker import Worker

__all__ = ["FleetReport", "ModelReport", "make_report"]

PREDICTED_REQUESTS = 500
"""Of a model; more are taken to go on like these."""


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One model of a fleet.

    Attributes:
        requests, failed, late: answered; of them, with an error; after their deadline.
        latency_seconds: from arrival to answer, on average; and the highest.
        predicted_latency_seconds: in a closed loop.
        weight_bytes: all its weights.
        quota_bytes: what it was given for weights.
        bytes_read: from disk.
        failure: why it does not run any more.
    """

    requests: int
    failed: int
    late: int
    latency_seconds: float
    worst_latency_seconds: float
    predicted_latency_seconds: float
    weight_bytes: int
    quota_bytes: int
    bytes_read: int
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class FleetReport:
    """A fleet so far.

    Attributes:
        budget_bytes, floor_bytes: what was allowed, and the process before any weight.
        peak_bytes: its largest resident set.
        policy: of the turns.
        max_active: requests under way at once.
        makespan_seconds: from the first request's arrival to the last answer.
        predicted_seconds: for a closed loop of as many requests, by policy.
        bound_seconds: as many rounds' computing, or the reading that the quotas leave; the longer.
        models: by name.
    """

    budget_bytes: int
    floor_bytes: int
    peak_bytes: int
    policy: str
    max_active: int
    makespan_seconds: float
    predicted_seconds: Mapping[str, float]
    bound_seconds: float
    models: Mapping[str, ModelReport]


def make_report(plan: FleetPlan, workers: Mapping[str, Worker], peak_bytes: int) -> FleetReport:
    """Blocking, for the second or so that predicting takes, however many requests there were."""
    totals = {name: worker.totals for name, worker in workers.items()}
    requests = {name: one.requests for name, one in totals.items()}
    scale = max(1.0, max(requests.values(), default=0) / PREDICTED_REQUESTS)
    some = {name: math.ceil(count / scale) for name, count in requests.items()}
    predictions = {policy: plan.predict(some, policy=policy) for policy in plan.round_seconds}
    own = predictions[plan.policy]
    models = {}
    for name, worker in workers.items():
        done = totals[name]
        models[name] = ModelReport(
            requests=done.requests,
            failed=done.failed,
            late=done.late,
            latency_seconds=done.latency_seconds / max(1, done.requests),
            worst_latency_seconds=done.worst_latency_seconds,
            predicted_latency_seconds=own.latency_seconds[name],
            weight_bytes=worker.prepared.weight_bytes,
            quota_bytes=plan.quotas[name],
            bytes_read=worker.bytes_read,
            failure=None if worker.failure is None else str(worker.failure),
        )
    began = min((done.first_arrived_seconds for done in totals.values()), default=0.0)
    ended = max((done.last_ended_seconds for done in totals.values()), default=0.0)
    compute = sum(sum(plan.members[name].block_seconds) * count for name, count in requests.items())
    reading = sum(plan.members[name].pass_bytes * count for name, count in requests.items()) / plan.bytes_per_second
    return FleetReport(
        budget_bytes=plan.budget_bytes,
        floor_bytes=plan.floor_bytes,
        peak_bytes=peak_bytes,
        policy=plan.policy,
        max_active=plan.max_active,
        makespan_seconds=max(0.0, ended - began),
        predicted_seconds={policy: scale * prediction.makespan_seconds for policy, prediction in predictions.items()},
        bound_seconds=max(compute, reading),
        models=models,
    )
