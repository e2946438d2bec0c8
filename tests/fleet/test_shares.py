"""Whose bytes are lent, and when; who pays where memory is short."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from hermes.errors import BudgetError
from hermes.fleet.lanes import Lanes
from hermes.fleet.quota import Need
from hermes.fleet.shares import Shares
from hermes.fleet.turns import Turns
from hermes.fleet.worker import Request, Worker

NAMES = ("one", "other")
ROUND_SECONDS = 2.0


@pytest.fixture
def world():
    """Two models with 100 bytes each, 10 of which they need; a clock that is set by hand."""

    class World:
        now = 0.0

        def look(self, now):
            self.now = now
            self.shares._lend()
            return self.shares.quotas

    made = World()
    made.turns = Turns("deadline", max_active=2, lanes=Lanes(), clock=lambda: made.now)
    made.shares = Shares(0, made.turns, elastic=False)
    made.shares.settle(1 << 50, 0, 0)
    for name in NAMES:
        made.turns.join(name, 1.0, lambda request: None)
        made.shares.grant(name, 100)
    made.workers = {name: Worker(name, None, made.turns) for name in NAMES}
    made.shares.watch(made.workers, dict.fromkeys(NAMES, Need(least_bytes=10, most_bytes=200)), ROUND_SECONDS)
    made.shares.close()  # it looks when it is told to
    return made


def test_a_model_lends_what_it_has_not_needed_for_two_rounds_of_the_others(world):
    whole = dict.fromkeys(NAMES, 100)
    world.turns.submit("one", None, None)
    for now in (1.0, 2.0, 3.9):
        assert world.look(now) == whole
    assert world.look(4.1)["other"] == 10


def test_nobody_lends_while_nobody_asks(world):
    whole = dict.fromkeys(NAMES, 100)
    for name in NAMES:
        world.turns.submit(name, None, None)
    world.look(1.0)
    world.turns.finished("one")
    assert world.look(2.0) == whole
    world.turns.finished("other")
    for now in (3.0, 5.5, 60.0):  # "one" has been idle for longer, but nobody has any use for its bytes
        assert world.look(now) == whole
    world.turns.submit("other", None, None)
    assert world.look(61.0) == whole  # the pause counts for nothing
    assert world.look(66.0)["one"] == 10


def test_the_request_that_computes_pays_and_only_where_nothing_else_is_left(world, monkeypatch):
    """Of the budget 100 bytes are for each model, 90 of which it could spare."""

    def look(excess_bytes):
        request = Request(call=str, future=Future(), arrived_seconds=0.0, deadline_seconds=None)
        world.workers["one"].under_way = request
        needed_bytes = world.shares.ledger.budget_bytes + excess_bytes
        monkeypatch.setattr(world.shares._working_set, "trimmed", lambda limit_bytes: needed_bytes)
        world.shares._relieve(0.0)
        return request.ended_by

    assert look(500) is None  # nobody computes
    world.turns.submit("one", None, None)
    assert look(-1) is None
    for name, worker in world.workers.items():
        worker.session = SimpleNamespace(engine=SimpleNamespace(resize=lambda nbytes: nbytes), name=name)
    assert look(180) is None
    assert min(world.shares.quotas.values()) == 10  # given back instead
    world.shares.ledger.reserve("measuring", 1)
    assert look(91) is None  # the newcomer pays
    world.shares.ledger.reserve("measuring", 0)
    assert isinstance(look(91), BudgetError)
