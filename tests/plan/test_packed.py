"""Weights stay packed where that is faster, and only there."""

from dataclasses import replace

import pytest

from hermes.plan import make_plan, simulate

HALF = 500


def packed_problem(make_problem, unpack_seconds):
    """Ten matrices of 100 bytes, 70 on disk; a disk of 100 bytes a second."""
    problem = make_problem([([100], 0.01, 0.01)] * 10, num_passes=10)
    units = [replace(unit, read_bytes=(70,), unpack_seconds=(unpack_seconds,)) for unit in problem.units]
    return replace(problem, units=units)


def plan_for(problem, **choices):
    return make_plan(problem, budget_bytes=HALF, limit_bytes=HALF, margin_bytes=0, **choices)


def test_more_weights_fit_when_they_stay_packed(make_problem):
    problem = packed_problem(make_problem, 0.001)
    plan = plan_for(problem)
    plain = plan_for(problem, resident_bytes=300)
    assert plan.packed_bytes > 0
    assert plan.pass_bytes < plain.pass_bytes
    assert plan.steady_pass_seconds < plain.steady_pass_seconds


def test_not_where_unpacking_takes_longer_than_reading(make_problem):
    assert plan_for(packed_problem(make_problem, 10.0)).packed_bytes == 0


def test_not_where_the_user_says_what_stays(make_problem):
    plan = plan_for(packed_problem(make_problem, 0.001), resident_bytes=200)
    assert (plan.packed_bytes, plan.resident_bytes) == (0, 200)


def test_what_stays_packed_is_read_once_and_unpacked_every_time(make_problem):
    problem = packed_problem(make_problem, 0.5)
    problem = replace(problem, units=[replace(unit, first_seconds=0.0, next_seconds=0.0) for unit in problem.units[:2]])
    nothing = [frozenset[int]()] * 2
    found = simulate(problem, [[0], [1]], nothing, 400, 70.0, packed=[frozenset({0}), frozenset({0})])
    assert found.first_pass_seconds == pytest.approx(2 + 0.5)  # the first is unpacked while the second is read
    assert found.steady_pass_seconds == pytest.approx(1.0)
