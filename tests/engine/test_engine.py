"""The right bytes in the right place, in every mode and order, read as often as the laws say."""

import random
import threading
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hermes.engine import EngineStats
from hermes.errors import BudgetError, EngineError
from hermes.memory.arena import Arena

NUM_BLOCKS = 5
NOTHING = [()] * NUM_BLOCKS
PARTLY = [{0}, (), {1, 2}, {0, 1}, ()]
EVERYTHING = [{0, 1}, {0}, {0, 1, 2}, {0, 1, 2}, {0}]
MODES = {
    "streaming": {"resident": NOTHING},
    "sequential": {"resident": NOTHING, "ahead": False},
    "partly resident": {"resident": PARTLY},
    "partly resident, sequential": {"resident": PARTLY, "ahead": False},
    "fully resident": {"resident": EVERYTHING},
    "fully resident, no window": {"resident": EVERYTHING, "ring_bytes": 0},
}


@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("num_agents", [1, 4])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_byte_of_every_pass(bench, mode, num_agents, direct):
    with bench(num_agents=num_agents, direct=direct, **mode) as run:
        places = run.engine.start()
        for _ in range(3):
            run.check_pass()
        contents = zip(places, run.pinned_expected, strict=True)
        assert [run.at(place, len(content)) for place, content in contents] == run.pinned_expected
        assert all(place.resident for place in places)
        stats = run.engine.stats
        assert stats.passes == 3
        assert len(stats.pass_seconds) == len(stats.pass_bytes) == len(stats.pass_stall_seconds) == 3


@pytest.mark.parametrize("resident", [NOTHING, PARTLY, EVERYTHING], ids=["nothing", "partly", "everything"])
def test_a_steady_pass_reads_what_streams_and_nothing_else(bench, resident):
    """Law 2, counted on the sequential engine, where a pass's reads are all its own."""
    with bench(resident=resident, ahead=False) as run:
        run.engine.start()
        for _ in range(3):
            run.check_pass()
        streamed = sum(run.streamed_bytes(block) for block in range(NUM_BLOCKS))
        every = sum(load.read_bytes for loads in run.blocks for load in loads)
        assert run.engine.stats.pass_bytes == [every, streamed, streamed]


def test_the_overlapping_engine_reads_no_more_than_what_it_holds_at_the_end(bench):
    with bench(window=1.5) as run:
        run.engine.start()
        for _ in range(4):
            run.check_pass()
        run.engine.close()
        streamed = sum(run.streamed_bytes(block) for block in range(NUM_BLOCKS))
        pinned = sum(load.read_bytes for load in run.pinned)
        ahead = run.engine.stats.bytes_read - pinned - 4 * streamed
        assert 0 <= ahead <= 2 * run.ring_bytes  # bounced pieces are read with their surroundings


def test_the_next_pass_is_read_while_the_last_block_is_held(bench, eventually):
    with bench(window=4.0) as run:
        run.engine.start()
        for block in range(NUM_BLOCKS):
            run.check(block)
        first = run.blocks[0][0].pieces[0].offset
        eventually(lambda: sum(offset == first for offset, _ in run.reader.reads) == 2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=25),
    resident=st.sampled_from([NOTHING, PARTLY, EVERYTHING]),
    window=st.sampled_from([1.0, 1.3, 2.5]),
    num_agents=st.integers(1, 3),
)
def test_any_order_of_wants(bench, order, resident, window, num_agents):
    with bench(resident=resident, window=window, num_agents=num_agents) as run:
        run.engine.start()
        run.check_pass(order)
        run.check_pass(order[::2])


def test_blocks_outside_the_pass_come_when_asked_for(bench):
    with bench(blocks_in_pass=3) as run:
        run.engine.start()
        for order in ([0, 1, 2], [0, 1, 2], [4, 0, 1, 2], [3]):
            run.check_pass(order)


def test_what_was_asked_for_is_wanted_without_waiting(bench, eventually):
    run = bench()
    run.engine.start()
    run.engine.begin_pass()
    run.check(0)
    run.engine.release()
    eventually(lambda: run.engine.is_there(1))
    said = []
    run.engine.ask(1, lambda: said.append(1))
    assert said == [1]  # it was there
    run.check(1)

    run.reader.gate.clear()
    run.engine.release()
    run.engine.ask(4, lambda: said.append(4))
    assert said == [1]
    run.reader.gate.set()
    eventually(lambda: said == [1, 4])
    run.check(4)
    run.engine.ask(2, lambda: said.append(2))
    run.engine.release()  # not wanted after all
    run.check(3)
    run.engine.end_pass()
    run.check_pass()


def test_fetch_goes_before_everything_that_is_queued(bench, eventually):
    run = bench(num_agents=1, ahead=False)
    run.engine.start()
    done = len(run.reader.reads)
    run.reader.gate.clear()
    waiter = threading.Thread(target=run.engine.want, args=(1,))
    waiter.start()
    eventually(lambda: len(run.reader.reads) == done + 1)  # at the gate; the block's other pieces are queued
    memory = Arena(run.extra.slot_bytes)
    fetcher = threading.Thread(target=run.engine.fetch, args=([(run.extra, memory.view)],))
    fetcher.start()
    eventually(lambda: run.engine._line.queue[0][0].load is run.extra)
    run.reader.gate.set()
    fetcher.join()
    waiter.join()
    offsets = [offset for offset, _ in run.reader.reads[done:]]
    assert offsets[1] == run.extra.pieces[0].offset
    assert sorted(offsets) == sorted(piece.offset for load in (run.blocks[1][0], run.extra) for piece in load.pieces)
    begin = run.extra.data_offset
    assert bytes(memory.view[begin : begin + run.extra.nbytes]) == run.extra_expected


@pytest.mark.parametrize("address_alignment", [1, 64])
@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
def test_tensors_begin_where_they_are_asked_to(bench, address_alignment, direct):
    with bench(address_alignment=address_alignment, direct=direct, window=1.5) as run:
        run.engine.start()
        for block in [*range(NUM_BLOCKS)] * 2:
            assert all(place.offset % address_alignment == 0 for place in run.check(block))


def test_fetch_of_nothing_and_of_the_empty_returns_at_once(bench):
    with bench() as run:
        run.engine.fetch([])
        empty = run.pinned[1]
        run.engine.fetch([(empty, memoryview(bytearray(empty.slot_bytes)))])
        assert run.engine.stats.bytes_read == 0


def test_fetched_rows_beside_a_running_pass(bench):
    with bench(window=1.5) as run:
        run.engine.start()
        memory = Arena(run.extra.slot_bytes)
        for block in random.Random(3).choices(range(NUM_BLOCKS), k=30):
            run.check(block)
            memory.view[:] = bytes(len(memory.view))
            run.engine.fetch([(run.extra, memory.view)])
            begin = run.extra.data_offset
            assert bytes(memory.view[begin : begin + run.extra.nbytes]) == run.extra_expected


def test_memory_is_reserved_before_it_is_taken(bench):
    with bench(resident=PARTLY) as run:
        kept = sum(run.slot(block, load) for block, loads in enumerate(PARTLY) for load in loads)
        pinned = sum(load.slot_bytes for load in run.pinned)
        assert dict(run.ledger.accounts) == {
            "window": run.ring_bytes,
            "resident": kept + pinned,
            "buffers": 2 * run.buffer_bytes,
        }
        needed = run.ledger.reserved_bytes
    bench(resident=PARTLY, budget_bytes=needed)
    with pytest.raises(BudgetError, match=r"resident needs .* try --budget"):
        bench(resident=PARTLY, budget_bytes=needed - 1)


def test_a_window_too_small_for_a_block_is_refused(bench, threads):
    with pytest.raises(EngineError, match="the window needs"):
        bench(ring_bytes=4096)
    assert not threads()


@pytest.mark.parametrize("resident", [NOTHING, PARTLY], ids=["streaming", "partly"])
def test_recorded_spans_cover_every_read_and_every_block(bench, resident):
    run = bench(resident=resident, record=True, window=1.5)
    run.engine.start()
    for _ in range(3):
        run.check_pass()
    run.engine.close()
    stats = run.engine.stats
    reads = [span for span in stats.spans if span.agent.startswith("loader")]
    blocks = [span for span in stats.spans if span.name.startswith("block")]
    waits = [span for span in stats.spans if span.name == "wait"]
    assert sum(span.nbytes for span in reads) == stats.bytes_read == sum(length for _, length in run.reader.reads)
    assert len(reads) == len(run.reader.reads)
    assert {span.agent for span in reads} <= {"loader 0", "loader 1"}
    assert {span.name for span in reads} == {
        load.name for loads in [*run.blocks, run.pinned] for load in loads if load.pieces
    }
    assert [span.name for span in blocks] == [f"block {block}" for block in range(NUM_BLOCKS)] * 3
    assert all(span.start_seconds <= span.end_seconds for span in stats.spans)
    assert sum(span.end_seconds - span.start_seconds for span in waits) <= stats.stall_seconds
    held = sorted((span.start_seconds, span.end_seconds) for span in blocks)
    assert all(a[1] <= b[0] for a, b in pairwise(held))


def test_nothing_is_recorded_unless_asked_for(bench):
    with bench() as run:
        run.engine.start()
        run.check_pass()
        assert not run.engine.stats.spans
        assert not run.engine.stats.memory


def test_the_clock_is_the_callers(bench):
    """A clock that stands still upsets nobody; the Daemon Agent divides by its steps."""
    with bench(record=True) as run:
        run.engine.clock = lambda: 0.0
        run.engine.start()
        run.check_pass()
        assert run.engine.stats.pass_seconds == [0.0]


def test_what_is_counted_of_passes_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr("hermes.engine.stats.KEPT_PASSES", 3)
    stats = EngineStats()
    for number in range(10):
        stats.begin_pass(10.0 * number)
        stats.bytes_read += number
        stats.end_pass(11.0 * number)
    assert stats.passes == 10
    assert (stats.pass_seconds, stats.pass_bytes, stats.pass_stall_seconds) == ([7.0, 8.0, 9.0], [7, 8, 9], [0.0] * 3)
