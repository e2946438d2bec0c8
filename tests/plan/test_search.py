"""The planner keeps the limit, refuses exactly where nothing works, and does what it is told."""

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.errors import BudgetError
from hermes.pipeload import smallest_ring
from hermes.plan import Bandwidth, Plan, Problem, UnitCost, make_plan, smallest_budget
from hermes.units import parse_bytes

MIB = 2**20
MARGIN = 5 * MIB


@st.composite
def problems(draw):
    size = st.one_of(st.integers(1, 5000), st.integers(1, 40).map(lambda n: n * MIB // 8), st.just(4096))
    loads = draw(st.lists(st.lists(size, min_size=1, max_size=3), min_size=1, max_size=8))
    seconds = st.floats(0, 0.1)
    packed = draw(st.booleans())
    units = [
        UnitCost(
            name=f"u{number}",
            slot_bytes=tuple(sizes),
            read_bytes=tuple(n * 7 // 10 + 1 if packed else n for n in sizes),
            first_seconds=draw(seconds),
            next_seconds=draw(seconds),
            unpack_seconds=tuple(draw(st.sampled_from([0.0, n * 1e-10])) for n in sizes) if packed else (),
        )
        for number, sizes in enumerate(loads)
    ]
    numbers = list(range(len(units)))
    num_in_pass = draw(st.integers(1, len(units)))
    pairs = [numbers[i : i + 2] for i in range(0, num_in_pass, 2)]
    pairs[-1] = [number for number in pairs[-1] if number < num_in_pass]
    groups = {
        "leaf": [[number] for number in numbers],
        "layer": pairs + [[number] for number in numbers[num_in_pass:]],
    }
    agents = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
    nbytes = st.integers(0, 20 * MIB)
    return Problem(
        units=units,
        num_in_pass=num_in_pass,
        groups=groups,
        bandwidths=[
            Bandwidth(num_agents=n, piece_bytes=MIB, bytes_per_second=draw(st.floats(1e6, 1e10))) for n in agents
        ],
        floor_bytes=draw(nbytes),
        heap_bytes=draw(nbytes),
        pinned_bytes=draw(nbytes),
        buffer_bytes=draw(st.sampled_from([0, 2 * MIB])),
        num_passes=draw(st.integers(1, 6)),
        touch_seconds_per_byte=draw(st.sampled_from([(), (3e-9,), (1e-10, 3e-9)])),
    )


def plan_for(problem, budget, **options):
    return make_plan(problem, budget_bytes=budget, limit_bytes=budget, margin_bytes=MARGIN, **options)


def check(problem, plan, limit):
    """A plan that could be run: inside the limit, its window large enough, its sums right."""
    assert isinstance(plan, Plan)
    assert plan.peak_bytes <= limit - MARGIN
    blocks = problem.groups[plan.granularity]
    slots = [[n for unit in block for n in problem.units[unit].slot_bytes] for block in blocks]
    streamed = [
        [n for load, n in enumerate(loads) if load not in kept]
        for loads, kept in zip(slots, plan.resident, strict=True)
    ]
    assert plan.ring_bytes >= smallest_ring(streamed)
    assert plan.resident_bytes == sum(map(sum, slots)) - sum(map(sum, streamed))
    reads = [[n for unit in block for n in problem.units[unit].read_bytes] for block in blocks]
    packed = plan.packed or [frozenset()] * len(blocks)
    assert plan.packed_bytes == sum(loads[load] for loads, kept in zip(reads, packed, strict=True) for load in kept)
    assert not any(one & other for one, other in zip(packed, plan.resident, strict=True))
    fixed = problem.floor_bytes + problem.heap_bytes + problem.pinned_bytes + plan.num_agents * problem.buffer_bytes
    kept_bytes = plan.resident_bytes + plan.packed_bytes
    assert fixed + plan.ring_bytes + kept_bytes <= limit - MARGIN  # what the ledger will be asked for
    in_pass = [number for number, block in enumerate(blocks) if block[0] < problem.num_in_pass]
    assert plan.pass_bytes == sum(
        n for b in in_pass for load, n in enumerate(reads[b]) if load not in plan.resident[b] | packed[b]
    )
    assert plan.bound in ("disk", "compute")
    assert 0 <= plan.first_pass_seconds <= plan.total_seconds * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(problem=problems(), over=st.floats(0, 2))
def test_no_plan_exceeds_its_limit(problem, over):
    total = sum(sum(unit.slot_bytes) for unit in problem.units)
    budget = smallest_budget(problem, MARGIN) + int(over * total)
    check(problem, plan_for(problem, budget), budget)


@settings(max_examples=80, deadline=None)
@given(problem=problems(), below=st.integers(1, 10 * MIB))
def test_refused_exactly_below_the_smallest_budget(problem, below):
    smallest = smallest_budget(problem, MARGIN)
    check(problem, plan_for(problem, smallest), smallest)
    for budget in (smallest - 1, smallest - below):
        with pytest.raises(BudgetError, match=r"too small.*try --budget \d+MiB$") as refusal:
            plan_for(problem, budget)
        assert refusal.value.minimum_bytes == smallest
        suggested = parse_bytes(str(refusal.value).rsplit(" ", 1)[1])
        check(problem, plan_for(problem, suggested), suggested)


@settings(max_examples=80, deadline=None)
@given(
    problem=problems(),
    num_agents=st.one_of(st.none(), st.integers(1, 6)),
    granularity=st.sampled_from([None, "leaf", "layer"]),
    share=st.one_of(st.none(), st.floats(0, 1.5)),
    sequential=st.booleans(),
)
def test_what_is_asked_for_is_kept(problem, num_agents, granularity, share, sequential):
    total = sum(sum(unit.slot_bytes) for unit in problem.units)
    resident_bytes = None if share is None else int(share * total)
    options = {
        "num_agents": num_agents,
        "granularity": granularity,
        "resident_bytes": resident_bytes,
        "sequential": sequential,
    }
    with pytest.raises(BudgetError) as refusal:
        plan_for(problem, MARGIN, **options)
    minimum = refusal.value.minimum_bytes
    with pytest.raises(BudgetError) as refusal:
        plan_for(problem, minimum - 1, **options)
    assert refusal.value.minimum_bytes == minimum
    for budget in (minimum, minimum + total):
        plan = plan_for(problem, budget, **options)
        check(problem, plan, budget)
        assert plan.sequential is sequential
        assert num_agents in (None, plan.num_agents)
        assert granularity in (None, plan.granularity)
        if resident_bytes is not None:
            assert plan.resident_bytes <= resident_bytes
            largest = max(n for unit in problem.units for n in unit.slot_bytes)
            assert plan.resident_bytes > min(resident_bytes, total) - largest


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_fully_resident_as_soon_as_it_fits(problem):
    problem = replace(problem, num_passes=max(2, problem.num_passes))  # for one pass nothing need stay
    total = sum(sum(unit.slot_bytes) for unit in problem.units)
    fixed = problem.floor_bytes + problem.heap_bytes + problem.pinned_bytes
    fixed += max(b.num_agents for b in problem.bandwidths) * problem.buffer_bytes
    plan = plan_for(problem, fixed + total + MARGIN)
    assert plan.pass_bytes == 0
    assert plan.resident_bytes == total
    assert plan.bound == "compute"


@settings(max_examples=200, deadline=None)
@given(problem=problems(), over=st.integers(0, 40 * MIB))
def test_nothing_is_left_out_that_would_have_been_chosen(problem, over):
    limit = smallest_budget(problem, MARGIN) + over
    limits = {"budget_bytes": limit, "limit_bytes": limit, "margin_bytes": MARGIN}
    settled = make_plan(problem, **limits)
    with mock.patch("hermes.plan.search.least_seconds", return_value=0.0):
        assert make_plan(problem, **limits) == settled


def test_as_many_agents_as_reach_a_good_rate(make_problem):
    bandwidths = [
        Bandwidth(num_agents=n, piece_bytes=MIB, bytes_per_second=rate)
        for n, rate in [(1, 5e8), (2, 9e8), (3, 1e9), (4, 6e8)]
    ]
    problem = make_problem([([MIB], 0.0, 0.0)] * 8, bandwidths=bandwidths, buffer_bytes=MIB)
    assert plan_for(problem, 20 * MIB).num_agents == 3
    assert plan_for(problem, 20 * MIB, num_agents=4).num_agents == 4
    assert plan_for(problem, 40 * MIB, num_agents=16).num_agents == 16
    # Where only one buffer fits beside the smallest window, one agent it is.
    assert plan_for(problem, MARGIN + 2 * MIB).num_agents == 1


def test_a_small_window_leaves_more_that_stays(make_problem):
    """Bound by the disk, each byte of window costs a byte read again in every pass."""
    problem = make_problem([([10 * MIB], 0.0, 0.0)] * 10, num_passes=20)
    plan = plan_for(problem, MARGIN + 60 * MIB)
    assert plan.ring_bytes == 10 * MIB
    assert plan.resident_bytes == 50 * MIB
    assert plan.bound == "disk"
    assert plan.bound_seconds == pytest.approx(50 * MIB / 100.0)


def test_a_cgroup_below_the_budget_is_named(make_problem):
    problem = make_problem([([MIB], 0.0, 0.0)] * 8)
    with pytest.raises(BudgetError, match=r"cgroup's limit of 5 MiB is below the 6 MiB .* raise the limit"):
        make_plan(problem, budget_bytes=100 * MIB, limit_bytes=5 * MIB, margin_bytes=MARGIN)


def test_a_window_that_the_disk_fills_faster_is_taken(make_problem):
    groups = {"leaf": [[number] for number in range(20)]}
    disk = Bandwidth(num_agents=1, piece_bytes=4096, bytes_per_second=MIB)
    problem = make_problem([((MIB,), 1.0, 1.0)] * 20, groups=groups, num_passes=5, bandwidths=[disk])
    limits = {"budget_bytes": 4 * MIB, "limit_bytes": 4 * MIB, "margin_bytes": 0}
    chosen = make_plan(problem, **limits)
    assert chosen.ring_bytes >= 2 * MIB  # so that one block is read while another is computed
    other = make_plan(replace(problem, windows=[(MIB, 8.0), (MIB + MIB // 4, 0.5)]), **limits)
    assert other.ring_bytes == MIB
    assert other.steady_pass_seconds < chosen.steady_pass_seconds * 1.2
    assert other.bound_seconds < chosen.bound_seconds * 1.2


def test_rates_between_windows(make_problem):
    problem = replace(make_problem([((100,), 1.0, 1.0)]), windows=[(100, 1.5), (200, 1.0), (400, 0.5)])
    rates = [problem.rate_into(window, 10.0) for window in (1, 100, 150, 200, 300, 400, 4000)]
    assert rates == pytest.approx([15, 15, 12.5, 10, 7.5, 5, 5])
    assert replace(problem, windows=()).rate_into(300, 10.0) == 10.0
