"""What of a model stays in its quota."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes.fleet.members import SMALL_BYTES, WINDOWS, Candidate, least_hidden, make_member, need_of
from hermes.fleet.predict import SWITCH_SECONDS, predict
from hermes.pipeload import smallest_ring
from hermes.plan import Bandwidth, Problem, UnitCost

MIB = 2**20


def problem_of(sizes: list[int], seconds: list[float], quiet: float) -> Problem:
    units = [
        UnitCost(name=str(number), slot_bytes=(n,), read_bytes=(n,), first_seconds=s, next_seconds=s)
        for number, (n, s) in enumerate(zip(sizes, seconds, strict=True))
    ]
    alone = [[number] for number in range(len(units))]
    return Problem(
        units=units,
        num_in_pass=len(units),
        groups=dict.fromkeys({granularity for granularity, _ in WINDOWS}, alone),
        bandwidths=[Bandwidth(num_agents=2, piece_bytes=MIB, bytes_per_second=1e9)],
        floor_bytes=0,
        heap_bytes=0,
        pinned_bytes=3 * MIB,
        buffer_bytes=0,
        num_passes=10,
        quiet=quiet,
        boundary_seconds=1e-4,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    sizes = draw(st.lists(st.sampled_from([MIB // 4, MIB, 4 * MIB, 9 * MIB, 24 * MIB]), min_size=1, max_size=30))
    seconds = draw(st.lists(st.floats(1e-4, 0.05), min_size=len(sizes), max_size=len(sizes)))
    return problem_of(sizes, seconds, draw(st.floats(0.5, 1.0)))


@given(problems(), st.sampled_from(WINDOWS), st.floats(0.0, 1.0))
def test_a_member_fits_its_quota_and_keeps_small_loads_first(problem, window, share):
    need = need_of(problem, window)
    quota = need.least_bytes + int(share * (need.most_bytes - need.least_bytes))
    member = make_member(Candidate(problem=problem, activation_bytes=0), quota, window, 1e9, patience_seconds=1.0)
    sizes = [loads[0] for loads in member.slots]
    kept = [number for number, loads in enumerate(member.resident) if loads]
    streamed = [number for number in range(len(sizes)) if number not in kept]
    held = problem.pinned_bytes + sum(sizes[number] for number in kept)
    assert held + (member.ring_bytes if streamed else 0) <= max(quota, need.least_bytes)
    assert smallest_ring([[sizes[number]] for number in streamed]) <= member.ring_bytes
    if any(sizes[number] <= SMALL_BYTES for number in streamed):
        # nothing larger stays but blocks that the window does not hold
        assert all(sizes[number] <= SMALL_BYTES or sizes[number] > member.ring_bytes / window[1] for number in kept)


@given(problems(), st.sampled_from(WINDOWS), st.floats(0.0, 1.0), st.integers(0, 60 * MIB))
def test_no_more_stays_than_may_and_the_window_has_the_rest(problem, window, share, allowed):
    need = need_of(problem, window)
    quota = need.least_bytes + int(share * (need.most_bytes - need.least_bytes))
    total = sum(sum(unit.slot_bytes) for unit in problem.units)
    candidate = Candidate(problem=problem, activation_bytes=0, resident_bytes=min(allowed, total - 1))
    member = make_member(candidate, quota, window, 1e9, patience_seconds=1.0)
    held = problem.pinned_bytes + sum(
        loads[number] for loads, kept in zip(member.slots, member.resident, strict=True) for number in kept
    )
    too_large = member.least_bytes - problem.pinned_bytes - member.ring_bytes
    assert held - problem.pinned_bytes - too_large <= candidate.resident_bytes
    if quota - need.least_bytes >= candidate.resident_bytes + 4096:
        assert quota - 4096 <= problem.pinned_bytes + too_large + candidate.resident_bytes + member.ring_bytes <= quota


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_wider_than_the_model_keeps_no_more_of_it_than_may_stay(window):
    problem = problem_of([4 * MIB] * 4, [0.01] * 4, 1.0)
    candidate = Candidate(problem=problem, activation_bytes=0, resident_bytes=0)
    member = make_member(candidate, need_of(problem, window).most_bytes, window, 1e9, patience_seconds=1.0)
    assert member.pass_bytes == 16 * MIB


@given(st.lists(problems(), min_size=1, max_size=4), st.sampled_from(WINDOWS[:4]), st.floats(-0.1, 1.1))
def test_bytes_for_what_hides_least_are_no_more_than_there_are(problems, window, share):
    candidates = {str(number): Candidate(problem=one, activation_bytes=0) for number, one in enumerate(problems)}
    needs = [need_of(one, window) for one in problems]
    least, most = sum(need.least_bytes for need in needs), sum(need.most_bytes for need in needs)
    budget = least + int(share * (most - least + 1))
    shares = least_hidden(candidates, window, budget)
    assert (shares is None) == (budget < least)
    if shares is not None:
        quotas = [shares[name][0] for name in candidates]
        assert all(need.least_bytes <= quota <= need.most_bytes for need, quota in zip(needs, quotas, strict=True))
        assert sum(quotas) == min(budget, most)


def test_bytes_go_to_blocks_that_compute_least():
    slow, fast = (problem_of([4 * MIB] * 8, [seconds] * 8, 1.0) for seconds in (0.05, 0.005))
    candidates = {
        "slow": Candidate(problem=slow, activation_bytes=0),
        "fast": Candidate(problem=fast, activation_bytes=0),
        "precious": Candidate(problem=slow, activation_bytes=0, importance=100.0),
    }
    least, most = need_of(candidates["slow"].problem, WINDOWS[0]).least_bytes, 35 * MIB
    shares = least_hidden(candidates, WINDOWS[0], 2 * most + least)
    assert {name: nbytes for name, (nbytes, _) in shares.items()} == {"slow": least, "fast": most, "precious": most}


def test_a_change_of_turns_costs():
    problem = problem_of([4 * MIB] * 10, [0.01] * 10, 1.0)
    need = need_of(problem, WINDOWS[0])
    candidate = Candidate(problem=problem, activation_bytes=0)
    member = make_member(candidate, need.most_bytes, WINDOWS[0], 1e12, patience_seconds=1.0)
    members, requests = dict.fromkeys("ab", member), dict.fromkeys("ab", 1)
    alone = predict(members, requests, 1e12, policy="deadline", max_active=1).makespan_seconds
    together = predict(members, requests, 1e12, policy="round-robin", max_active=2).makespan_seconds
    turns = 2 * 11  # of ten blocks each, and one to begin
    assert abs(together - alone - (turns - 2) * SWITCH_SECONDS) < 1e-6


def test_reading_less_computes_faster():
    problem = problem_of([4 * MIB] * 10, [0.01] * 10, 0.8)
    need = need_of(problem, WINDOWS[0])

    def seconds(quota: int) -> float:
        member = make_member(
            Candidate(problem=problem, activation_bytes=0), quota, WINDOWS[0], 1e9, patience_seconds=1.0
        )
        return sum(member.block_seconds)

    assert abs(seconds(need.most_bytes) - (0.8 * 0.1 + 10e-4)) < 1e-9
    assert seconds(need.least_bytes) > seconds((need.least_bytes + need.most_bytes) // 2) > seconds(need.most_bytes)
