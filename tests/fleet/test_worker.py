"""Requests of one model: cancelled, raising what they like, submitted while it goes; no thread is lost to them."""

import gc
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, wait
from types import SimpleNamespace

import pytest

from hermes.errors import EngineError, HermesError, InputError, ReadError
from hermes.fleet.lanes import Lanes
from hermes.fleet.turns import Turns
from hermes.fleet.worker import KEPT_ANSWERS, Worker

SECONDS = 20


class Running:
    """A worker with an engine that streams nothing, and fails when it is told to."""

    def __init__(self):
        self.lanes = Lanes()
        self.turns = Turns("deadline", max_active=1, lanes=self.lanes)
        self.worker = Worker("net", SimpleNamespace(module="module"), self.turns)
        self.worker.session = SimpleNamespace(
            engine=SimpleNamespace(raise_if_stopped=self.raise_if_stopped),
            stats=SimpleNamespace(bytes_read=0),
            close=lambda: None,
        )
        self.stopped_by = None
        self.turns.join("net", 1.0, self.worker.serve)
        self.lanes.open()

    def raise_if_stopped(self):
        if self.stopped_by is not None:
            raise self.stopped_by

    def ask(self, call=lambda module: module):
        return self.worker.submit(call, None)

    def blocked(self):
        """A request under way, and what lets it end."""
        began, gate = threading.Event(), threading.Event()
        future = self.ask(lambda module: began.set() or gate.wait(SECONDS))
        assert began.wait(SECONDS)
        return future, gate

    def close(self):
        for request in self.turns.close():
            request.cancel()
        self.lanes.close()


@pytest.fixture
def running():
    made = Running()
    yield made
    closing = threading.Thread(target=made.close, daemon=True)
    closing.start()
    closing.join(SECONDS)
    assert not closing.is_alive()


def test_a_request_that_its_owner_cancels_is_passed_over(running):
    first, gate = running.blocked()
    second, third = running.ask(), running.ask()
    assert second.cancel()
    assert not first.cancel()  # it is under way
    gate.set()
    assert third.result(SECONDS) == "module"
    assert first.result(SECONDS) is True
    assert wait([second], SECONDS).done == {second}
    assert running.worker.prepared.module == running.ask().result(SECONDS)


def test_what_waits_at_the_end_is_cancelled_whether_its_owner_did_so_or_not(running):
    _, gate = running.blocked()
    futures = [running.ask() for _ in range(3)]
    futures[0].cancel()
    futures[1].add_done_callback(lambda future: sys.exit(1))
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    gate.set()
    assert wait(futures, SECONDS).not_done == set()
    closing.join(SECONDS)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(InputError, match="closed"):
        running.ask()


def test_a_callback_that_leaves_the_program_does_not_end_the_thread_that_computes(running):
    first, gate = running.blocked()
    first.add_done_callback(lambda future: sys.exit(1))
    gate.set()
    assert first.result(SECONDS) is True
    assert running.ask().result(SECONDS) == "module"


@pytest.mark.parametrize("error", [FileNotFoundError("labels.txt"), TimeoutError("a peer"), EngineError("another's")])
def test_what_a_request_raises_of_its_own_ends_no_model(running, error):
    def call(module):
        raise error

    assert running.ask(call).exception(SECONDS) is error
    assert running.worker.failure is None
    assert running.ask().result(SECONDS) == "module"


@pytest.mark.parametrize("is_stopped", [True, False])
def test_what_ends_the_engine_ends_the_model(running, is_stopped):
    """An engine that has stopped says why; a file that has changed is noticed by an engine that still runs."""
    reading = ReadError("net.safetensors: cut off")
    if is_stopped:
        running.stopped_by = reading

    def call(module):
        raise ValueError("of a pass without its weights") if is_stopped else reading

    assert running.ask(call).exception(SECONDS) is not None
    errors = [running.ask().exception(SECONDS) for _ in range(3)]
    assert {str(error) for error in errors} == {str(reading)}
    assert all(isinstance(error, HermesError) for error in errors)
    assert len({id(error) for error in errors}) == 3  # none gathers the frames of the others' requests
    assert running.worker.failure.__traceback__ is None
    assert running.worker.session is None


def test_a_model_that_goes_answers_what_it_has_taken_and_takes_no_more(running):
    first, gate = running.blocked()
    second = running.ask()
    leaving = threading.Thread(target=running.turns.leave, args=("net",), daemon=True)
    leaving.start()
    taken = []

    def refused():
        try:
            taken.append(running.ask())
        except InputError:
            return True
        return False

    while not refused():
        pass
    assert leaving.is_alive()
    gate.set()
    assert [future.result(SECONDS) for future in (first, second, *taken)][1:] == ["module"] * (1 + len(taken))
    leaving.join(SECONDS)
    with pytest.raises(InputError, match="no model 'net' any more"):
        running.ask()


def test_every_request_is_answered_or_refused_while_others_close(running):
    futures: list[Future] = []
    started = threading.Barrier(5)

    def spam():
        started.wait(SECONDS)
        while True:
            try:
                futures.append(running.ask(lambda module: None))
            except InputError:
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=spam, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait(SECONDS)
        while not futures:
            pass
        running.close()
        for thread in threads:
            thread.join(SECONDS)
    finally:
        sys.setswitchinterval(interval)
    assert wait(futures, SECONDS).not_done == set()


def test_a_thousand_answers_are_kept_and_all_are_counted(running):
    for _ in range(2 * KEPT_ANSWERS):
        running.ask(lambda module: None)
    failed = running.ask(lambda module: 1 // 0)
    assert failed.exception(SECONDS) is not None
    totals = running.worker.totals
    assert len(running.worker.answered) == KEPT_ANSWERS
    assert (totals.requests, totals.failed, totals.late) == (2 * KEPT_ANSWERS + 1, 1, 0)
    latest = running.worker.answered[-1]
    assert latest.failed
    assert totals.last_ended_seconds == latest.ended_seconds
    assert 0 < totals.latency_seconds / totals.requests <= totals.worst_latency_seconds


def test_bytes_that_closed_engines_have_read_are_counted(running):
    running.worker.session.stats = SimpleNamespace(bytes_read=100)
    running.worker.pause()
    running.worker.session = SimpleNamespace(stats=SimpleNamespace(bytes_read=20))
    assert running.worker.bytes_read == 120


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_request_stays_once_it_is_answered(running, fails):
    class Input:
        pass

    def ask():
        given = Input()

        def call(module, given=given):
            if fails:
                raise ValueError(given)

        future = running.ask(call)
        future.exception(SECONDS)
        return weakref.ref(given)

    left = ask()
    until = time.monotonic() + SECONDS
    while left() is not None and time.monotonic() < until:
        gc.collect()
    assert left() is None


def test_an_error_that_is_its_own_cause_is_an_answer_like_any_other(running):
    def call(module):
        error = ValueError("round and round")
        error.__cause__ = cause = ValueError("and round")
        cause.__cause__ = error
        raise error

    assert "round" in str(running.ask(call).exception(SECONDS))
    assert running.ask().result(SECONDS) == "module"
