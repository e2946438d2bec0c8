"""Once everything is resident nothing is wanted before it is computed; what is in use is not given back even so."""

import random
import threading

import pytest

EVERYTHING = [{0, 1}, {0}, {0, 1, 2}, {0, 1, 2}, {0}]
ALL_BUT_ONE = [*EVERYTHING[:4], ()]
SOME = [{0, 1}, (), {0, 1, 2}, {0, 2}, {0}]


def look(run, block):
    """Compare every byte of a block that was not wanted."""
    places = run.engine.places(block)
    assert [run.at(p, len(c)) for p, c in zip(places, run.expected[block], strict=True)] == run.expected[block]


def test_it_is_settled_once_a_pass_has_fetched_everything(bench, unwatched):
    run = bench(resident=EVERYTHING)
    run.engine.start()
    assert not run.engine.is_settled
    run.check_pass()
    assert run.engine.is_settled
    reads = len(run.reader.reads)
    run.engine.begin_pass()
    for block in range(len(run.blocks)):
        assert run.engine.hold(block)
        look(run, block)
    run.engine.end_pass()
    assert run.engine.held is None
    assert len(run.reader.reads) == reads


def test_what_streams_or_is_recorded_or_closed_never_is(bench, unwatched):
    for options in ({"resident": ALL_BUT_ONE}, {"resident": EVERYTHING, "record": True}):
        run = bench(**options)
        run.engine.start()
        for _ in range(2):
            run.check_pass()
            assert not run.engine.is_settled
    run = bench(resident=EVERYTHING)
    run.engine.start()
    run.check_pass()
    run.engine.close()
    assert not run.engine.is_settled


def test_what_is_held_stays_until_another_is_wanted(bench, unwatched):
    run = bench(resident=EVERYTHING)
    run.engine.start()
    run.check_pass()
    run.engine.begin_pass()
    assert run.engine.hold(2)
    planned = run.ledger.accounts["resident"]
    streamed = run.slot(2, 0)
    run.engine.resize(run.ledger.reserved_bytes - planned + streamed)  # all but what cannot go
    assert not run.engine.is_settled
    look(run, 2)
    assert run.ledger.accounts["resident"] >= sum(run.slot(2, load) for load in range(3))
    for block in (3, 4, 0, 1, 2):
        assert not run.engine.hold(block)
        run.check(block)
    run.engine.end_pass()
    run.check_pass()
    assert run.ledger.accounts["resident"] < planned


def test_it_settles_again_when_all_have_come_back(bench, unwatched):
    run = bench(resident=EVERYTHING, elastic=True)
    run.engine.start()
    run.check_pass()
    everything = run.ledger.reserved_bytes
    run.engine.resize(everything - 1)
    run.check_pass()
    assert not run.engine.is_settled
    run.engine.resize(everything)
    run.check_pass()  # had begun to stream what was not kept
    run.check_pass()
    assert run.engine.is_settled
    for block in range(len(run.blocks)):
        look(run, block)


def test_blocks_that_stay_are_not_wanted_among_others_that_stream(bench, unwatched, eventually):
    run = bench(resident=SOME)
    run.engine.start()
    assert not any(run.engine.hold(block) for block in range(len(run.blocks)))
    run.check_pass()
    streamed = [
        load for loads, kept in zip(run.blocks, SOME, strict=True) for n, load in enumerate(loads) if n not in kept
    ]
    reads = len(run.reader.reads)
    for _ in range(3):
        run.engine.begin_pass()
        for block, kept in enumerate(SOME):
            if len(kept) < len(run.blocks[block]):
                assert not run.engine.hold(block)
                run.check(block)
            else:
                assert run.engine.hold(block)
                look(run, block)
                assert run.engine.held == block
                eventually(lambda: run.engine.is_there(1) or run.engine.is_there(3))  # the next that streams
        run.engine.end_pass()
        assert run.engine.held is None
    # Nothing that was read ahead was given up: at most a pass is.
    assert len(run.reader.reads) - reads <= 4 * sum(len(load.pieces) for load in streamed)


@pytest.mark.parametrize("resident", [EVERYTHING, SOME])
def test_a_thread_that_gives_back_while_another_computes(bench, unwatched, resident):
    """At any moment: what was held, by either way, has its bytes until the next one is."""
    run = bench(resident=resident, elastic=True)
    run.engine.start()
    run.check_pass()
    everything = run.ledger.reserved_bytes
    stop = threading.Event()

    def squeeze():
        rng = random.Random(1)
        while not stop.is_set():
            run.engine.resize(everything - rng.randrange(everything // 2))
            stop.wait(rng.random() / 500)
            run.engine.resize(everything)
            stop.wait(rng.random() / 100)

    thread = threading.Thread(target=squeeze)
    thread.start()
    free = 0
    try:
        for _ in range(400):
            run.engine.begin_pass()
            for block in range(len(run.blocks)):
                if run.engine.hold(block):
                    look(run, block)
                    free += 1
                else:
                    run.check(block)
            run.engine.end_pass()
    finally:
        stop.set()
        thread.join()
    assert 0 < free < 400 * len(run.blocks)
