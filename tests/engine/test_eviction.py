"""The world turns out tighter than planned: resident weights are given back, the bytes stay right, the ledger sinks."""

import itertools
import mmap
import random
import types

import pytest

from hermes.engine.daemon import (
    FAULT_STEP_BYTES,
    FAULTS_PER_SECOND,
    FAULTS_TO_DROP,
    FULL_BYTES,
    TRIM_BYTES,
    FaultMeter,
    MemorySample,
    ThrashWatch,
    WorkingSet,
    bytes_to_give_back,
)
from hermes.errors import BudgetError

NUM_BLOCKS = 5
PARTLY = [{0}, (), {1, 2}, {0, 1}, ()]
EVERYTHING = [{0, 1}, {0}, {0, 1, 2}, {0, 1, 2}, {0}]
LIMIT = 1 << 30


class Process:
    """Real memory as the test would have it: what is reserved, and something that grows."""

    def __init__(self, monkeypatch):
        self.ledger = None
        self.others = 0
        monkeypatch.setattr("hermes.engine.daemon.WorkingSet", lambda: self)

    def __call__(self):
        return self.others + (self.ledger.accounts.get("resident", 0) if self.ledger is not None else 0)

    def trimmed(self, limit_bytes):
        return self()

    def watch(self, run, *, over=0):
        """From now on the process holds `over` more than its limit."""
        self.ledger = run.ledger
        self.others = LIMIT + over - run.ledger.accounts["resident"]


def test_heap_goes_back_before_the_limit_and_again_after_as_much_more(monkeypatch):
    held = {"weights": 0, "heap": 0}
    monkeypatch.setattr("hermes.engine.daemon.resident_and_mapped_bytes", lambda: (sum(held.values()), 0))
    monkeypatch.setattr("hermes.engine.daemon.trim_heap", lambda: held.update(heap=0))
    working_set = WorkingSet()

    def look(weights, heap):
        held.update(weights=weights, heap=heap)
        return working_set.trimmed(LIMIT)

    assert look(LIMIT - TRIM_BYTES - 2, 2) == LIMIT - TRIM_BYTES  # far enough
    assert look(LIMIT - TRIM_BYTES, 2) == LIMIT - TRIM_BYTES
    assert look(LIMIT - TRIM_BYTES, 2) == LIMIT - TRIM_BYTES + 2  # not again for so little
    assert look(LIMIT - TRIM_BYTES, TRIM_BYTES + 1) == LIMIT - TRIM_BYTES  # above the limit


@pytest.fixture
def process(monkeypatch):
    return Process(monkeypatch)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (MemorySample(needed_bytes=100, limit_bytes=100), 0),
        (MemorySample(needed_bytes=101, limit_bytes=100), 1),
        (MemorySample(needed_bytes=0, limit_bytes=100, faults_per_second=FAULTS_PER_SECOND), 0),
        (
            MemorySample(needed_bytes=0, limit_bytes=100, faults_per_second=FAULTS_PER_SECOND + 1),
            FAULT_STEP_BYTES,
        ),
        (MemorySample(needed_bytes=130, limit_bytes=100, faults_per_second=1e6), 30),
    ],
)
def test_how_much_to_give_back(sample, expected):
    assert bytes_to_give_back(sample) == expected


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "sequential"])
@pytest.mark.parametrize("resident", [PARTLY, EVERYTHING], ids=["partly", "everything"])
def test_weights_go_back_step_by_step_and_every_byte_stays_right(bench, unwatched, process, resident, ahead):
    run = bench(resident=resident, ahead=ahead, limit_bytes=LIMIT)
    run.engine.start()
    run.check_pass()
    planned = run.ledger.accounts["resident"]
    stats = run.engine.stats
    evicted = [0]
    while evicted[-1] < planned // 2:
        process.watch(run, over=5000)
        run.check_pass()  # at its end they are chosen,
        run.check_pass()  # and those that were in use are gone after one pass more
        assert stats.evicted_bytes >= evicted[-1] + 5000
        assert run.ledger.accounts["resident"] == planned - stats.evicted_bytes
        assert process() <= LIMIT
        evicted.append(stats.evicted_bytes)
    for _ in range(2):
        run.check_pass()
    assert stats.evicted_bytes == evicted[-1]
    assert len(run.engine.store.view) >= planned


def test_the_pages_really_go(bench, unwatched, process):
    run = bench(resident=EVERYTHING, ahead=False, limit_bytes=LIMIT)
    run.engine.start()
    for block in range(NUM_BLOCKS):
        for place, content in zip(run.check(block), run.expected[block], strict=True):
            assert place.resident or not content
    before = bytes(run.engine.store.view)
    process.watch(run, over=20_000)
    run.engine.end_pass()
    after = bytes(run.engine.store.view)
    gone = sum(
        1
        for page in range(0, len(before), mmap.PAGESIZE)
        if any(before[page : page + mmap.PAGESIZE]) and not any(after[page : page + mmap.PAGESIZE])
    )
    assert gone * mmap.PAGESIZE >= 20_000 - 2 * mmap.PAGESIZE
    assert run.engine.stats.evicted_bytes >= 20_000
    run.check_pass()


def test_what_is_pinned_stays(bench, unwatched, process):
    run = bench(resident=EVERYTHING, limit_bytes=LIMIT)
    places = run.engine.start()
    run.check_pass()
    for _ in range(30):
        process.watch(run, over=1)
        run.check_pass()
    contents = zip(places, run.pinned_expected, strict=True)
    assert [run.at(place, len(content)) for place, content in contents] == run.pinned_expected


def test_the_daemon_gives_back_while_blocks_are_computed(bench, monkeypatch, process, eventually):
    monkeypatch.setattr("hermes.engine.daemon.WATCH_SECONDS", 0.0005)
    random_ = random.Random(5)
    run = bench(resident=EVERYTHING, window=1.2, num_agents=3, limit_bytes=LIMIT)
    run.engine.start()
    for step in range(60):
        if step % 6 == 5 and run.ledger.accounts["resident"] > 60_000:
            before = run.engine.stats.evicted_bytes
            process.watch(run, over=1)
            eventually(lambda before=before: run.engine.stats.evicted_bytes > before)
        run.check(random_.randrange(NUM_BLOCKS))
    assert run.engine.stats.evicted_bytes > 0
    run.check_pass()


def test_a_process_beyond_its_budget_is_refused_with_what_it_needs(bench, unwatched, process):
    run = bench(resident=PARTLY, limit_bytes=LIMIT, budget_bytes=LIMIT + 4096)
    run.engine.start()
    run.check_pass()
    process.watch(run, over=10 * 2**20)
    run.engine.begin_pass()
    with pytest.raises(BudgetError, match=r"no weights left to give back.*try --budget \d+MiB") as refusal:
        run.engine.end_pass()
    assert refusal.value.minimum_bytes >= LIMIT + 9 * 2**20
    for _ in range(2):
        for block in range(NUM_BLOCKS):
            run.check(block)
    # Everything that could go has gone, and the ledger says so.
    assert run.ledger.accounts["resident"] == sum(load.slot_bytes for load in run.pinned)


@pytest.fixture
def noticed(bench, monkeypatch, process, eventually):
    """An engine in the middle of a pass, whose Daemon Agent has seen a moment's excess."""
    monkeypatch.setattr("hermes.engine.daemon.WATCH_SECONDS", 0.001)
    run = bench(resident=EVERYTHING, limit_bytes=LIMIT, budget_bytes=LIMIT)
    run.engine.start()
    run.check_pass()
    run.engine.begin_pass()
    assert run.engine.hold(0)
    looks = []
    monkeypatch.setattr(process, "trimmed", lambda limit: looks.append(limit) or (limit + 2**20) // len(looks))
    eventually(lambda: len(looks) > 1)
    return run


@pytest.mark.parametrize(
    ("before", "ends"),
    [
        (lambda engine: None, lambda engine: engine.hold(1) or engine.want(1)),
        (lambda engine: None, lambda engine: engine.want(1)),
        (lambda engine: None, lambda engine: engine.end_pass()),
        (lambda engine: engine.ask(1, lambda: None) or engine.want(1), lambda engine: engine.count_pass()),
    ],
    ids=["hold", "want", "end", "behind-the-copy-agent"],
)
def test_what_the_daemon_sees_ends_the_pass_under_way_and_no_other(noticed, before, ends):
    before(noticed.engine)
    with pytest.raises(BudgetError, match=r"no weights left to give back.*try --budget") as refusal:
        ends(noticed.engine)
    assert refusal.value.minimum_bytes > LIMIT
    noticed.engine.end_pass()
    for _ in range(2):
        noticed.check_pass()


def test_what_the_daemon_has_seen_before_a_pass_does_not_end_it(noticed):
    noticed.check_pass()


def test_memory_that_was_taken_is_reserved_for_as_long_as_somebody_has_it(bench):
    engine = bench().engine
    tensor = engine.take(50_000).view[:10]
    engine.take(60_000)  # whose fetch is interrupted
    last = engine.take(4096)
    assert engine.ledger.accounts["late"] == 50_000 + last.nbytes
    del tensor, last
    engine.begin_pass()
    assert engine.ledger.accounts["late"] == 0


def test_memory_is_taken_beside_heap_that_waits_for_room(bench):
    needed = bench(resident=EVERYTHING).ledger.reserved_bytes
    run = bench(resident=EVERYTHING, budget_bytes=needed)
    run.engine.start()
    run.check_pass()
    run.check(1)
    waiting = run.slot(0, 0) + run.slot(0, 1)  # as if block 1 were to leave it; what block 0 leaves comes first
    run.engine._holdings._heap_bytes = waiting
    taken = run.engine.take(run.slot(2, 1))
    assert run.ledger.accounts["late"] == taken.nbytes
    assert run.ledger.accounts["heap"] == waiting


def test_thrash_gives_back_a_step_at_a_time(bench, monkeypatch, process, eventually):
    """Major faults, counted by a script: far more than a few per look."""
    count = itertools.count(0, 10**6)
    monkeypatch.setattr(
        "hermes.engine.daemon.find_cgroup", lambda: types.SimpleNamespace(limit_bytes=LIMIT, charged_bytes=lambda: 0)
    )
    monkeypatch.setattr("hermes.engine.daemon.major_faults", lambda: next(count))
    monkeypatch.setattr("hermes.engine.daemon.WATCH_SECONDS", 0.001)
    monkeypatch.setattr(
        "hermes.engine.daemon.FaultMeter", lambda count, now: FaultMeter(count, now, window_seconds=0.001)
    )
    run = bench(resident=EVERYTHING, limit_bytes=LIMIT, record=True)
    planned = run.ledger.accounts["resident"]
    run.engine.start()
    for _ in range(3):
        run.check_pass()
    eventually(lambda: run.engine.stats.evicted_bytes > 0)
    for _ in range(3):
        run.check_pass()
    assert run.engine.stats.memory
    run.engine.close()
    assert run.ledger.accounts["resident"] == planned - run.engine.stats.evicted_bytes


def test_a_burst_of_faults_is_no_thrash():
    meter = FaultMeter(0, 0.0)
    assert meter.rate(100, 0.5) == 0.0  # mid-window
    assert meter.rate(9000, 1.0) == 0.0  # a burst: nothing before it
    assert meter.rate(9000, 2.0) == 0.0  # and nothing after it
    assert meter.rate(9300, 3.0) == 0.0
    assert meter.rate(9500, 4.0) == 200.0
    assert meter.rate(9500, 4.5) == 0.0


@pytest.mark.parametrize("limit", [LIMIT, None])
@pytest.mark.parametrize("left", [FULL_BYTES - 1, FULL_BYTES])
def test_a_full_cgroup_is_rid_of_what_faults_have_read_around(monkeypatch, limit, left):
    """Of one that is not full nothing is evicted; without a limit, pages are not this process's to give."""
    faults, seconds, dropped = [5000], [0.0], []
    cgroup = types.SimpleNamespace(limit_bytes=limit, charged_bytes=lambda: LIMIT - left)
    monkeypatch.setattr("hermes.engine.daemon.find_cgroup", lambda: cgroup)
    monkeypatch.setattr("hermes.engine.daemon.major_faults", lambda: faults[0])
    monkeypatch.setattr("hermes.engine.daemon.drop_read_around", lambda: dropped.append(seconds[0]))
    thrash = ThrashWatch(lambda: seconds[0])
    few, many = FAULTS_TO_DROP - 1, FAULTS_PER_SECOND
    rates = []
    for seconds[0], more in ((0.1, few), (0.2, 1), (0.3, few), (1.0, 0), (2.0, many), (3.0, many)):
        faults[0] += more
        rates.append(thrash())
    assert dropped == ([0.2, 2.0, 3.0] if limit and left < FULL_BYTES else [])
    assert rates == ([0.0, 0.0, 0.0, 0.0, 2.0 * few + 1, many] if limit else [0.0] * 6)
