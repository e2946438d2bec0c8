"""Problems small enough to work out by hand."""

import pytest

from hermes.plan import Bandwidth, Problem, UnitCost


@pytest.fixture
def make_problem():
    """A problem of units given as (bytes of its loads, first seconds, next seconds); blocks as wanted."""

    def make(units, *, groups=None, num_passes=1, bandwidths=None, **fields):
        costs = [
            UnitCost(
                name=f"unit {number}",
                slot_bytes=tuple(loads),
                read_bytes=tuple(loads),
                first_seconds=first,
                next_seconds=later,
            )
            for number, (loads, first, later) in enumerate(units)
        ]
        zero = {"floor_bytes": 0, "heap_bytes": 0, "pinned_bytes": 0, "buffer_bytes": 0, "num_in_pass": len(costs)}
        return Problem(
            units=costs,
            groups=groups or {"layer": [[number] for number in range(len(costs))]},
            bandwidths=bandwidths or [Bandwidth(num_agents=1, piece_bytes=4096, bytes_per_second=100.0)],
            num_passes=num_passes,
            **zero | fields,
        )

    return make
