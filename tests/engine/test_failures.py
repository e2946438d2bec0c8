"""Law 5: an error in any agent stops the others and comes out of the wait. Never a hang or a silent wrong number."""

import errno
import os
import shutil
import signal
import threading
import traceback
import weakref

import pytest

from hermes.errors import EngineError, HermesError, ReadError
from hermes.memory.arena import Arena

NUM_BLOCKS = 5
PARTLY = [{0}, (), {1, 2}, {0, 1}, ()]


def run_on(run):
    """Pass after pass, until something stops it."""
    run.engine.start()
    while True:
        run.check_pass()


def want_all(run, num_passes):
    for _ in range(num_passes):
        for block in range(NUM_BLOCKS):
            run.engine.want(block)


@pytest.fixture
def interrupted(eventually):
    """Calls something in the main thread, and presses Ctrl-C once the reader stands at its closed gate."""

    def press(run, call, *, opens_gate=False):
        assert threading.current_thread() is threading.main_thread()
        before = len(run.reader.reads)
        run.reader.gate.clear()

        def interrupt():
            eventually(lambda: len(run.reader.reads) > before)
            with run.engine._lock:  # free only once the main thread waits
                pass
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        def handle(*_):
            if opens_gate:
                run.reader.gate.set()
            raise KeyboardInterrupt

        thread = threading.Thread(target=interrupt)
        old = signal.signal(signal.SIGINT, handle)
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                call()
        finally:
            thread.join()
            signal.signal(signal.SIGINT, old)

    return press


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "sequential"])
@pytest.mark.parametrize("nth", range(1, 40, 4))
def test_a_read_error_comes_out_of_the_wait(bench, eventually, threads, nth, ahead):
    run = bench(resident=PARTLY, ahead=ahead, num_agents=3)
    run.reader.fail_at = nth
    with pytest.raises(ReadError, match=r"^(b\d\.t\d|pinned\.\d): model.safetensors: reading failed$") as failure:
        run_on(run)
    assert failure.value.__cause__ is not None
    # The others stop by themselves, and what comes later says the same.
    eventually(lambda: _is_quiet(run))
    for _ in range(2):
        with pytest.raises(ReadError, match="reading failed"):
            run.engine.want(0)
        with pytest.raises(ReadError, match="reading failed"):
            run.engine.fetch([(run.extra, memoryview(bytearray(run.extra.slot_bytes)))])
        with pytest.raises(ReadError, match="reading failed"):
            run.engine.begin_pass()
        run.engine.end_pass()
    run.engine.close()
    assert not threads()
    assert run.reader.closed == 1


@pytest.mark.parametrize("error", [ReadError("reading failed"), ValueError("odd")])
@pytest.mark.parametrize("nth", range(1, 40, 4))
def test_a_failed_engines_memory_goes_when_it_is_closed(bench, nth, error):
    """The error that it keeps goes on telling where it came from, and holds none of it."""
    run = bench(resident=PARTLY, num_agents=3)
    memory = [weakref.ref(arena._map) for arena in (run.engine.ring, run.engine.store, *run.engine._line._buffers)]
    run.reader.error, run.reader.fail_at = error, nth
    with pytest.raises(HermesError):
        run_on(run)
    run.engine.close()
    assert not [ref for ref in memory if ref() is not None]
    assert "read_into" in "".join(traceback.format_exception(run.engine._error))


def test_nothing_is_read_after_an_error(bench, eventually):
    run = bench(window=4.0, num_agents=1)
    run.reader.fail_at = 3
    with pytest.raises(ReadError):
        run_on(run)
    eventually(lambda: _is_quiet(run))
    assert len(run.reader.reads) == 3


def test_an_error_before_anybody_waits_is_not_lost(bench, eventually):
    run = bench()
    run.engine.start()
    run.check(0)
    run.reader.fail_at = 1
    eventually(lambda: run.engine._error is not None or _pass(run))
    with pytest.raises(ReadError):
        run.engine.want(3)


def _is_quiet(run):
    """No agent is at a piece of this engine's, and none will be."""
    return not run.engine._line.queue and not run.engine._line.under_way


def _pass(run):
    try:
        run.engine.want(2)
    except ReadError:
        return True
    return False


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (ValueError("odd"), r"b0\.t0: cannot place its bytes: odd"),
        (MemoryError("no room"), r"b0\.t0: cannot place its bytes: no room"),
        (SystemExit("stop"), r"an agent failed: SystemExit\('stop'\)"),
    ],
)
def test_whatever_stops_an_agent_is_seen(bench, error, match):
    run = bench(num_agents=1, ahead=False)
    run.engine.start()
    run.reader.error = error
    run.reader.fail_at = len(run.reader.reads) + 1
    with pytest.raises(EngineError, match=match):
        run.engine.want(0)


def test_whatever_stops_the_daemon_is_seen(bench, monkeypatch, eventually):
    monkeypatch.setattr("hermes.engine.daemon.WATCH_SECONDS", 0.001)
    run = bench()
    run.engine.start()
    run.check(0)

    def broken(limit_bytes):
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(run.engine._daemon._working_set, "trimmed", broken)
    eventually(lambda: not run.engine._daemon._thread.is_alive())
    with pytest.raises(EngineError, match="an agent failed: ZeroDivisionError"):
        run.engine.want(1)


@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
def test_a_file_cut_off_while_running_stops_the_pass(bench, direct):
    run = bench(direct=direct)
    run.engine.start()
    run.check_pass()
    os.truncate(run.path, 20_000)
    with pytest.raises(ReadError, match=r"model.safetensors: truncated while running: .* bytes at offset \d+"):
        want_all(run, 2)
    with pytest.raises(ReadError, match=r"truncated while running|was written to while in use"):
        run.engine.begin_pass()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: shutil.copy(path, path.with_suffix(".new")).replace(path), "was replaced by another file"),
        (lambda path: path.unlink(), "vanished while in use"),
        (lambda path: os.utime(path, ns=(1, 1)), "was written to while in use"),
    ],
    ids=["replaced", "vanished", "written"],
)
def test_a_file_that_changes_is_refused_at_the_next_pass_or_at_the_end_of_this_one(bench, change, match):
    run = bench()
    run.engine.start()
    run.check_pass()
    run.engine.begin_pass()
    run.check(0)
    change(run.path)
    with pytest.raises(ReadError, match=match):
        run.engine.end_pass()
    with pytest.raises(ReadError, match=match):
        run.engine.begin_pass()
    run.engine.end_pass()  # no pass had begun: nothing to say
    run.engine.close()


def test_close_is_idempotent_and_final(bench, threads):
    run = bench(resident=PARTLY, window=3.0)
    run.engine.start()
    run.check(0)
    for _ in range(3):
        run.engine.close()
    assert not threads()
    with pytest.raises(EngineError, match="the engine is closed"):
        run.engine.want(1)
    with pytest.raises(EngineError, match="the engine is closed"):
        run.engine.fetch([(run.extra, memoryview(bytearray(run.extra.slot_bytes)))])
    run.engine.end_pass()
    assert len(run.engine.ring.view) == 0


def test_close_before_anything_was_done(bench, threads):
    bench().engine.close()
    assert not threads()


def test_buffers_that_there_is_no_memory_for_leave_no_agents(bench, monkeypatch):
    def refuse(nbytes):
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr("hermes.engine.agents.Arena", refuse)
    with pytest.raises(OSError, match="no room"):
        bench()


@pytest.mark.parametrize("what", ["want", "fetch"])
def test_close_during_a_wait_ends_it(bench, eventually, what):
    run = bench(ahead=False)
    run.engine.start()
    before = len(run.reader.reads)
    run.reader.gate.clear()
    seen = []

    def wait():
        try:
            if what == "want":
                run.engine.want(1)
            else:
                run.engine.fetch([(run.extra, memoryview(bytearray(run.extra.slot_bytes)))])
        except EngineError as error:
            seen.append(error)

    waiter = threading.Thread(target=wait)
    closer = threading.Thread(target=run.engine.close)
    waiter.start()
    eventually(lambda: len(run.reader.reads) > before)
    closer.start()
    waiter.join(10)  # although the read is stuck still
    assert not waiter.is_alive()
    assert "the engine is closed" in str(seen[0])
    run.reader.gate.set()
    closer.join(10)
    assert not closer.is_alive()
    assert run.reader.closed == 1


def test_whoever_has_asked_is_told_of_the_end(bench, eventually):
    run = bench()
    run.engine.start()
    run.reader.gate.clear()
    said = []
    run.engine.ask(4, lambda: said.append("closed"))
    closing = threading.Thread(target=run.engine.close)
    closing.start()
    eventually(lambda: said == ["closed"])
    run.reader.gate.set()
    closing.join()
    run.engine.ask(0, lambda: said.append("at once"))
    assert said == ["closed", "at once"]
    with pytest.raises(EngineError, match="closed"):
        run.engine.want(0)


def test_an_interrupted_wait_leaves_an_engine_that_works(bench, interrupted):
    run = bench(resident=PARTLY, ahead=False)
    run.engine.start()
    interrupted(run, lambda: run.engine.want(0))
    run.engine.end_pass()
    run.reader.gate.set()
    for _ in range(2):
        run.check_pass()
    interrupted(run, lambda: run.engine.want(3))
    run.reader.gate.set()
    run.check(3)
    run.check(1)


def test_resident_bytes_still_on_their_way_when_interrupted_are_waited_for(bench, interrupted, eventually):
    run = bench(resident=[{0, 1}, {0}, {0, 1, 2}, {0, 1, 2}, {0}], ahead=False, num_agents=1)
    run.engine.start()
    interrupted(run, lambda: run.engine.want(0))
    run.engine.end_pass()
    got = []
    again = threading.Thread(target=lambda: got.append(run.check(0)))
    again.start()
    eventually(lambda: run.engine._pipeline._wanted is not None)
    assert not got
    run.reader.gate.set()
    again.join()
    assert got


def test_an_interrupted_fetch_writes_no_more_once_it_has_raised(bench, interrupted):
    run = bench(ahead=False, num_agents=2)
    run.engine.start()
    memory = Arena(run.extra.slot_bytes)
    # The interrupt comes out only after the reads that were at the gate.
    interrupted(run, lambda: run.engine.fetch([(run.extra, memory.view)] * 3), opens_gate=True)
    memory.view[:] = b"\x55" * len(memory.view)
    reads = len(run.reader.reads)
    run.check_pass()
    assert bytes(memory.view) == b"\x55" * len(memory.view)
    extra = {piece.offset for piece in run.extra.pieces}
    merged = {piece.offset for piece in run.blocks[3][2].pieces}
    assert not (extra - merged) & {offset for offset, _ in run.reader.reads[reads:]}


def test_an_error_in_the_callers_code_leaves_an_engine_that_works(bench):
    run = bench(window=2.0)
    run.engine.start()
    for stop in range(NUM_BLOCKS):
        run.engine.begin_pass()
        for block in range(stop + 1):
            run.check(block)
        run.engine.end_pass()  # as the hook does that always runs
        run.check_pass()
