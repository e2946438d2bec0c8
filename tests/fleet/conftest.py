"""Plans of made-up models."""

import pytest

from hermes.fleet.members import Candidate
from hermes.fleet.plan import plan_fleet
from hermes.plan import Bandwidth, Problem, UnitCost

MIB = 2**20


@pytest.fixture(scope="session")
def plan_of():
    """A plan within 300 MiB, 160 of them for weights, for models whose blocks have so many bytes."""

    def plan(sizes):
        return plan_fleet(
            {name: _candidate(blocks) for name, blocks in sizes.items()},
            budget_bytes=300 * MIB,
            limit_bytes=300 * MIB,
            margin_bytes=24 * MIB,
            floor_bytes=100 * MIB,
            slack_bytes=16 * MIB,
        )

    return plan


def _candidate(sizes):
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
