"""A fleet's report, from what workers have counted."""

from types import SimpleNamespace

import pytest

from hermes.fleet.answers import Answered, Totals
from hermes.fleet.report import PREDICTED_REQUESTS, make_report


@pytest.fixture(scope="module")
def plan(plan_of):
    return plan_of({"net": [8 * 2**20] * 4})


def worker_of(totals):
    return SimpleNamespace(totals=totals, prepared=SimpleNamespace(weight_bytes=1), bytes_read=2, failure=None)


def test_sums_are_those_of_the_answers(plan):
    totals = Totals()
    for arrived, ended in ((1.0, 2.0), (1.5, 4.5)):
        answered = Answered(arrived_seconds=arrived, began_seconds=arrived, ended_seconds=ended, late=ended > 4)
        totals = totals.plus(answered)
    report = make_report(plan, {"net": worker_of(totals)}, 0)
    done = report.models["net"]
    assert (done.requests, done.failed, done.late) == (2, 0, 1)
    assert (done.latency_seconds, done.worst_latency_seconds, report.makespan_seconds) == (2.0, 3.0, 3.5)


def test_no_request_is_no_time(plan):
    report = make_report(plan, {"net": worker_of(Totals())}, 0)
    assert report.makespan_seconds == report.models["net"].latency_seconds == 0.0


def test_a_million_requests_are_predicted_from_some_of_them(plan, monkeypatch):
    asked = []
    real = type(plan).predict

    def predict(self, requests, **options):
        asked.append(requests)
        return real(self, requests, **options)

    monkeypatch.setattr(type(plan), "predict", predict)
    report = make_report(plan, {"net": worker_of(Totals(requests=1_000_000, first_arrived_seconds=0.0))}, 0)
    assert all(requests == {"net": PREDICTED_REQUESTS} for requests in asked)
    assert report.predicted_seconds[plan.policy] == pytest.approx(1e6 * plan.round_seconds[plan.policy], rel=0.1)
