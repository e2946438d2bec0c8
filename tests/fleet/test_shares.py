"""Whose bytes are lent, and when."""

import pytest

from hermes.fleet.lanes import Lanes
from hermes.fleet.quota import Need
from hermes.fleet.shares import Shares
from hermes.fleet.turns import Turns
from hermes.fleet.worker import Worker

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
    workers = {name: Worker(name, None, made.turns) for name in NAMES}
    made.shares.watch(workers, dict.fromkeys(NAMES, Need(least_bytes=10, most_bytes=200)), ROUND_SECONDS)
    yield made
    made.shares.close()


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
