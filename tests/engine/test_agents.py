"""Agents that several engines share: who is served first, and what one line's end or error is to the others."""

import threading

import pytest

from hermes.engine import EngineStats, LoadingAgents
from hermes.engine.agents import Line, Ticket, forget_frames
from hermes.errors import InputError, ReadError
from hermes.pipeload import Load
from hermes.pipeload.loads import Piece

PIECE = Piece(file=0, offset=0, length=64, required=64, target=0)


class GatedReader:
    """Notes whose piece is read; the first read of all waits for the gate."""

    def __init__(self, name, order, gate, begun, fails=False):
        self.name, self.order, self.gate, self.begun, self.fails = name, order, gate, begun, fails

    def read_into(self, file, offset, target, required):
        self.order.append(self.name)
        self.begun.set()
        assert self.gate.wait(10)
        if self.fails:
            raise ReadError("reading failed")
        return required


@pytest.fixture
def shared():
    """One agent, and a way to open lines at which it stops until `gate` is set."""

    class Shared:
        def __init__(self):
            self.agents = LoadingAgents(1)
            self.order, self.errors = [], []
            self.gate, self.begun, self.done = threading.Event(), threading.Event(), threading.Semaphore(0)

        def line(self, name, urgency=0.0, **options):
            return Line(
                self.agents,
                GatedReader(name, self.order, self.gate, self.begun, **options),
                buffer_bytes=0,
                on_error=self.errors.append,
                on_read=None,
                stats=EngineStats(),
                clock=lambda: 0.0,
                urgency=lambda: urgency,
            )

        def ticket(self, pieces=1):
            load = Load(name="t", slot_bytes=64, data_offset=0, nbytes=64, pieces=(PIECE,) * pieces)
            return Ticket(load=load, slot=memoryview(bytearray(64)), on_done=lambda _: self.done.release())

    made = Shared()
    yield made
    made.gate.set()
    made.agents.close()


@pytest.mark.parametrize("num_agents", [0, -1])
def test_no_agents_are_refused(num_agents):
    with pytest.raises(InputError, match="never read anything; try --agents 1"):
        LoadingAgents(num_agents)


def test_the_most_urgent_line_is_served_first(shared):
    late, soon = shared.line("late", urgency=9.0), shared.line("soon", urgency=1.0)
    late.submit([shared.ticket(3)])
    assert shared.begun.wait(10)  # the agent is at the first piece, and everything else waits
    soon.submit([shared.ticket(2)])
    shared.gate.set()
    for _ in range(2):
        assert shared.done.acquire(timeout=10)
    assert shared.order == ["late", "soon", "soon", "late", "late"]


def test_equals_take_turns(shared):
    one, other = shared.line("one"), shared.line("other")
    one.submit([shared.ticket(3)])
    assert shared.begun.wait(10)
    other.submit([shared.ticket(3)])
    shared.gate.set()
    for _ in range(2):
        assert shared.done.acquire(timeout=10)
    assert shared.order == ["one", "other", "one", "other", "one", "other"]


def test_an_error_stops_its_own_line_alone(shared):
    broken, sound = shared.line("broken", fails=True), shared.line("sound", urgency=1.0)
    broken.submit([shared.ticket(5)])
    assert shared.begun.wait(10)
    sound.submit([shared.ticket(2)])
    shared.gate.set()
    assert shared.done.acquire(timeout=10)
    assert shared.order == ["broken", "sound", "sound"]
    assert [str(error) for error in shared.errors] == ["t: reading failed"]
    broken.submit([shared.ticket()])  # dropped
    broken.close()
    sound.close()
    assert shared.agents.lines == []


def test_an_agent_itself_may_close_a_line_and_end_the_agents(shared):
    """As the garbage collector may have it do, which ends an engine in whatever thread it runs."""
    line = shared.line("line")
    ticket = shared.ticket()

    def close(_):
        line.close()
        shared.agents.close()
        shared.done.release()

    ticket.on_done = close
    shared.gate.set()
    line.submit([ticket])
    assert shared.done.acquire(timeout=10)


def test_a_line_that_closes_waits_for_its_read_and_drops_the_rest(shared):
    line, other = shared.line("line"), shared.line("other")
    line.submit([shared.ticket(4)])
    assert shared.begun.wait(10)
    closing = threading.Thread(target=line.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    other.submit([shared.ticket()])
    shared.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert shared.done.acquire(timeout=10)
    assert shared.order == ["line", "other"]


def test_causes_that_go_round_in_circles():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    forget_frames(first)
