"""Plans of fleets with odd members."""

import pytest

from hermes.fleet.members import Candidate
from hermes.fleet.plan import plan_fleet
from hermes.plan import Bandwidth, Problem, UnitCost

MIB = 2**20


def candidate_of(*sizes):
    units = [
        UnitCost(name=str(n), slot_bytes=(size,), read_bytes=(size,), first_seconds=1e-3, next_seconds=1e-3)
        for n, size in enumerate(sizes)
    ]
    alone = [[number] for number in range(len(units))]
    problem = Problem(
        units=units,
        num_in_pass=len(units),
        groups=dict.fromkeys(("leaf", "joined", "half", "layer"), alone),
        bandwidths=[Bandwidth(num_agents=2, piece_bytes=8 * MIB, bytes_per_second=1e9)],
        floor_bytes=0,
        heap_bytes=0,
        pinned_bytes=0,
        buffer_bytes=0,
        num_passes=4,
    )
    return Candidate(problem=problem, activation_bytes=MIB)


@pytest.mark.parametrize("sizes", [(), (0,)])
def test_a_model_without_weights_beside_one_that_streams(sizes):
    plan = plan_fleet(
        {"activation": candidate_of(*sizes), "net": candidate_of(*[32 * MIB] * 10)},
        budget_bytes=300 * MIB,
        limit_bytes=300 * MIB,
        margin_bytes=24 * MIB,
        floor_bytes=100 * MIB,
        slack_bytes=16 * MIB,
    )
    assert plan.quotas["activation"] == 0
    assert plan.plans["net"].pass_bytes > 0
