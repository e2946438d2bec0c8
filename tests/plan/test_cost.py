"""The simulated clock: against cases worked out by hand, and against bounds that nothing can beat."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.pipeload import smallest_ring
from hermes.plan import TOUCH_STEP_BYTES, Bandwidth, Problem, UnitCost, simulate, spread
from hermes.plan.cost import START_SECONDS, least_seconds, touch_seconds


def run(problem, resident=None, ring_bytes=10**6, rate=100.0, **options):
    blocks = [[number] for number in range(len(problem.units))]
    return simulate(problem, blocks, resident or [frozenset()] * len(blocks), ring_bytes, rate, **options)


def test_one_pass_bound_by_the_disk(make_problem):
    # Reads end at 1, 2, 3 s; each block computes for 0.5 s after its own.
    found = run(make_problem([([100], 0.5, 0.5)] * 3))
    assert found.first_pass_seconds == pytest.approx(3.5)
    assert found.total_seconds == pytest.approx(3.5)


def packed(problem, seconds):
    """Every load takes a core so long to unpack."""
    units = [replace(unit, unpack_seconds=(seconds,) * len(unit.slot_bytes)) for unit in problem.units]
    return replace(problem, units=units)


def test_agents_unpack_while_others_read(make_problem):
    # Reads end at 1, 2, 3 s, each is unpacked on both cores in 0.5 s; the last block has nothing beside it to wait for.
    problem = packed(make_problem([([100], 0.0, 0.0)] * 3, num_cores=2), 1.0)
    assert run(problem).first_pass_seconds == pytest.approx(3.5)


def test_unpacking_can_be_what_all_wait_for(make_problem):
    problem = packed(make_problem([([100], 0.0, 0.0)] * 3, num_cores=2), 4.0)
    assert run(problem).first_pass_seconds == pytest.approx(1.0 + 3 * 2.0)


def test_unpacking_takes_cores_from_the_computation_unless_that_was_measured_so(make_problem):
    problem = packed(make_problem([([100], 4.0, 4.0)] * 3, num_cores=2), 1.0)
    # 1.5 s until the first block is there, and 0.5 s for each load beside 12 s of computing: two are of the next pass.
    assert run(problem).first_pass_seconds == pytest.approx(1.5 + 12.0 + 4 * 0.5)
    measured = replace(problem, unpacking_slows_compute=False)
    assert run(measured).first_pass_seconds == pytest.approx(1.5 + 12.0)


def test_one_pass_bound_by_computing(make_problem):
    # The first block waits 1 s, the others never.
    assert run(make_problem([([100], 2.0, 2.0)] * 3)).first_pass_seconds == pytest.approx(7.0)


def test_computing_is_faster_the_fewer_weights_stream(make_problem):
    problem = make_problem([([100], 2.0, 2.0), ([300], 2.0, 2.0)], num_passes=9, quiet=0.5)
    for resident, part in (((), 1.0), ((0,), 0.75), ((1,), 0.25), ((0, 1), 0.0)):
        kept = [frozenset({0}) if number in resident else frozenset() for number in range(2)]
        found = run(problem, kept, rate=1e6)
        assert found.first_pass_seconds >= 4.0  # all weights come from disk in it
        assert found.steady_pass_seconds == pytest.approx(4.0 * (0.5 + 0.5 * part))


def test_what_a_first_pass_computes_longer_hides_reading_too(make_problem):
    problem = make_problem([([100], 2.0, 2.0)] * 3, num_passes=2, cold_seconds=1.5)
    found = run(problem)
    assert found.first_pass_seconds == pytest.approx(1.0 + 1.5 + 6.0)
    assert found.steady_pass_seconds == pytest.approx(6.0)
    assert run(problem, ahead=False).first_pass_seconds == pytest.approx(3.0 + 1.5 + 6.0 + 2 * START_SECONDS)


def test_no_passes_take_no_time(make_problem):
    units = [([100], 0.5, 0.5)] * 3
    none, one = run(make_problem(units, num_passes=0)), run(make_problem(units))
    assert none.total_seconds == 0.0
    assert none.first_pass_seconds == one.first_pass_seconds


def test_sequential_is_the_sum(make_problem):
    problem = make_problem([([100], 0.5, 0.25)] * 3, num_passes=10)
    found = run(problem, ahead=False)
    first, later = 4.5 + 2 * START_SECONDS, 3.75 + 3 * START_SECONDS  # the disk is idle before each read but the first
    assert found.first_pass_seconds == pytest.approx(first)
    assert found.steady_pass_seconds == pytest.approx(later)
    assert found.total_seconds == pytest.approx(first + 9 * later)


def test_the_window_is_the_stop_signal(make_problem):
    problem = make_problem([([100], 1.0, 1.0)] * 3)
    # Room for one block of 100 and a half: the next is read only once this one is computed, by a disk that was idle.
    assert run(problem, ring_bytes=150).first_pass_seconds == pytest.approx(6.0 + 2 * START_SECONDS)
    assert run(problem, ring_bytes=200).first_pass_seconds == pytest.approx(4.0)
    half = make_problem([([60, 40], 1.0, 1.0)] * 2)
    # 160 bytes: 60 of the second block fit beside the first (0.6 s, hidden), 40 are read afterwards.
    assert run(half, ring_bytes=160).first_pass_seconds == pytest.approx(1.0 + 1.0 + 0.4 + 1.0 + START_SECONDS)


def test_resident_loads_are_read_in_the_first_pass_only(make_problem):
    problem = make_problem([([50, 50], 0.0, 0.0)] * 2, num_passes=5)
    found = run(problem, resident=[frozenset({0}), frozenset({0})], ring_bytes=100)
    assert found.first_pass_seconds == pytest.approx(2.0)
    assert found.steady_pass_seconds == pytest.approx(1.0)
    assert found.total_seconds == pytest.approx(2.0 + 4 * 1.0)


def test_the_ring_runs_on_across_passes(make_problem):
    # While the last block computes (4 s), the next pass's first two are read; its own next visit waits for its release.
    problem = make_problem([([100], 0.0, 0.0)] * 2 + [([100], 4.0, 4.0)], num_passes=3)
    found = run(problem, ring_bytes=400)
    assert found.first_pass_seconds == pytest.approx(7.0)
    assert found.steady_pass_seconds == pytest.approx(5.0 + START_SECONDS)


def test_memory_is_touched_once(make_problem):
    # One load streamed, one resident: 1 s each to read, 0.5 s more where the memory is new.
    problem = make_problem([([100], 0.0, 0.0)] * 2, touch_seconds_per_byte=(0.005,), num_passes=3)
    found = run(problem, resident=[frozenset({0}), frozenset()], ring_bytes=200)
    assert found.first_pass_seconds == pytest.approx(3.0)
    assert found.steady_pass_seconds == pytest.approx(1.0)


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.lists(st.integers(1, 50), max_size=3), min_size=1, max_size=6))
    seconds = st.integers(0, 20).map(lambda tenths: tenths / 10)
    units = [
        UnitCost(
            name="u",
            slot_bytes=tuple(loads),
            read_bytes=tuple(loads),
            first_seconds=draw(seconds),
            next_seconds=draw(seconds),
        )
        for loads in sizes
    ]
    problem = Problem(
        units=units,
        num_in_pass=len(units),
        groups={},
        bandwidths=[Bandwidth(num_agents=1, piece_bytes=1, bytes_per_second=1.0)],
        floor_bytes=0,
        heap_bytes=0,
        pinned_bytes=0,
        buffer_bytes=0,
        num_passes=draw(st.integers(1, 3)),
        touch_seconds_per_byte=draw(st.sampled_from([(), (0.002,)])),
    )
    resident = spread(sizes, draw(st.integers(0, sum(map(sum, sizes)))))
    ring_bytes = smallest_ring(sizes) + draw(st.integers(0, 100))
    return problem, resident, ring_bytes


@settings(max_examples=200, deadline=None)
@given(case=cases(), rate=st.integers(1, 200), ahead=st.booleans())
def test_neither_the_disk_nor_the_processor_is_outrun(case, rate, ahead):
    problem, resident, ring_bytes = case
    found = run(problem, resident, ring_bytes, rate, ahead=ahead)
    units, passes = problem.units, problem.num_passes
    every = sum(sum(unit.read_bytes) for unit in units)
    steady = sum(
        n for unit, kept in zip(units, resident, strict=True) for i, n in enumerate(unit.read_bytes) if i not in kept
    )
    first = sum(unit.first_seconds for unit in units)
    later = sum(unit.next_seconds for unit in units)
    slack = 1e-9
    assert found.first_pass_seconds >= max(every / rate, first) - slack
    assert found.steady_pass_seconds >= (later if passes > 1 else first) - slack
    read_seconds = (every + (passes - 1) * steady) / rate
    compute_seconds = first + (passes - 1) * later
    least = least_seconds(problem, [[number] for number in range(len(units))], resident, rate)
    kept_bytes = sum(units[block].slot_bytes[load] for block, loads in enumerate(resident) for load in loads)
    kept_seconds = kept_bytes * sum(problem.touch_seconds_per_byte)
    assert least == pytest.approx(max(read_seconds + kept_seconds, compute_seconds))
    assert found.total_seconds >= least - slack
    # Nor is it slower than doing one thing at a time: every read once, and once more what is read ahead at the end.
    touch_seconds = (every + ring_bytes) * sum(problem.touch_seconds_per_byte)
    assert found.total_seconds <= read_seconds + touch_seconds + ring_bytes / rate + compute_seconds + slack


@settings(max_examples=200, deadline=None)
@given(case=cases(), rate=st.integers(1, 100), factor=st.floats(1, 4))
def test_overlap_and_a_faster_disk_never_cost_time(case, rate, factor):
    problem, resident, ring_bytes = case
    slow = run(problem, resident, ring_bytes, rate)
    # Where a span lies in the ring depends on when the ring was empty, hence up to one load more or less of waiting.
    slack = max((n for unit in problem.units for n in unit.read_bytes), default=0) / rate * problem.num_passes + 1e-9
    assert run(problem, resident, ring_bytes, rate * factor).total_seconds <= slow.total_seconds + slack
    if not problem.touch_seconds_per_byte:
        assert slow.total_seconds <= run(problem, resident, ring_bytes, rate, ahead=False).total_seconds + slack


def test_memory_at_hand_is_cheaper_than_the_rest():
    curve = (1.0, 2.0, 4.0)
    step = TOUCH_STEP_BYTES
    assert touch_seconds((), 0, 100) == 0.0
    assert touch_seconds(curve, 0, step) == step
    assert touch_seconds(curve, step // 2, step) == step // 2 * 3
    assert touch_seconds(curve, 10 * step, 3) == 12.0
    assert touch_seconds(curve, 0, 4 * step) == step * (1 + 2 + 4 + 4)
