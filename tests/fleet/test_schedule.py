"""The schedule under random fleets: one turn at a time, never stuck, nobody starved; bytes divided within bounds."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.errors import BudgetError, EngineError, InputError
from hermes.fleet.quota import Need, divide, lend
from hermes.fleet.schedule import (
    POLICIES,
    Admit,
    Arrived,
    Changed,
    Finished,
    Go,
    Joined,
    Left,
    Reached,
    Ready,
    Schedule,
)


class World:
    """Models made of counters; the disk brings blocks when the test says. Watches every promise on the way."""

    def __init__(self, policy, max_active):
        self.schedule = Schedule(policy, max_active=max_active)
        self.policy, self.max_active = policy, max_active
        self.now = 0.0
        self.running = None
        self.waiting = set()
        self.active = {}  # model -> deadline
        self.queues = {}  # model -> deadlines
        self.turns = []  # who had one, since the last change of who is active
        self.left = {}  # blocks to go
        self.arrived = {}  # model -> requests so far, likewise below
        self.begun = {}
        self.answered = 0

    def tell(self, event):
        for order in self.schedule.on(event):
            match order:
                case Admit(name, request):
                    assert name not in self.active
                    assert request == self.begun.get(name, 0)  # each once, in order
                    self.begun[name] = request + 1
                    if self.policy == "deadline":  # nobody idle waits for an earlier one
                        idle = [min(q) for n, q in self.queues.items() if q and n not in self.active]
                        assert min(self.queues[name]) == min(idle)
                    self.active[name] = self.queues[name].pop(0)
                    self.turns = []
                case Go(name):
                    assert self.running is None
                    assert name in self.active
                    assert name not in self.waiting
                    if self.policy == "deadline":
                        ready = {n: min([d, *self.queues[n]]) for n, d in self.active.items() if n not in self.waiting}
                        assert ready[name] == min(ready.values())
                    else:
                        self.turns.append(name)
                        recent = self.turns[-len(self.active) :]
                        assert len(set(recent)) == len(recent)  # each once in a rotation
                    self.running = name
        assert len(self.active) <= self.max_active
        assert len(self.schedule.waiting) == sum(map(len, self.queues.values()))

    def check_live(self):
        """Work implies that somebody computes, or that somebody's block is on its way."""
        if any(self.queues.values()) or self.active:
            assert self.running is not None or self.waiting

    def arrive(self, name, patience, deadline):
        self.queues[name].append(max(self.now, deadline) if deadline is not None else self.now + patience)
        self.arrived[name] = self.arrived.get(name, 0) + 1
        self.tell(Arrived(name, self.now, deadline, self.arrived[name] - 1))

    def step(self, ready):
        name, self.running = self.running, None
        self.left[name] -= 1
        if self.left[name] < 0:
            del self.active[name]
            self.turns = []
            self.answered += 1
            self.tell(Finished(name))
        else:
            if not ready:
                self.waiting.add(name)
            keeps = self.schedule.keeps(name)
            self.tell(Reached(name, ready))
            assert not ready or keeps == (self.running == name)

    def load(self, name):
        self.waiting.remove(name)
        self.tell(Ready(name))


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    patiences=st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    max_active=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_any_fleet_is_served_one_at_a_time(policy, patiences, max_active, seed):
    """Arrivals in any order, disks of any speed, models that come and go: all is answered, in the order promised."""
    random_ = random.Random(seed)
    world = World(policy, max_active)
    models = {f"m{number}": patience for number, patience in enumerate(patiences)}
    asked = 0
    for name, patience in models.items():
        world.queues[name], world.left[name] = [], 0
        world.tell(Joined(name, patience))
    for step in range(random_.randrange(150)):
        world.now += random_.random()
        match random_.choice(["arrive", "step", "step", "step", "load", "come", "go"]):
            case "arrive":
                name = random_.choice(sorted(models))
                if name not in world.active:
                    world.left[name] = random_.randrange(4)
                world.arrive(name, models[name], random_.choice([None, world.now + 5 * random_.random() - 1]))
                asked += 1
            case "step" if world.running:
                world.step(random_.random() < 0.6)
            case "load" if world.waiting:
                world.load(random_.choice(sorted(world.waiting)))
            case "come":
                name = f"n{step}"
                models[name], world.queues[name], world.left[name] = 1.0, [], 0
                world.tell(Joined(name, 1.0))
            case "go" if len(models) > 1:
                name = random_.choice(sorted(models))
                if name not in world.active and not world.queues[name]:
                    del models[name], world.queues[name]
                    world.tell(Left(name))
        world.check_live()
    for _ in range(10_000):
        if world.running:
            world.step(random_.random() < 0.6)
        elif world.waiting:
            world.load(random_.choice(sorted(world.waiting)))
        else:
            break
        world.check_live()
    assert world.answered == asked
    assert not any(world.schedule.backlog(name) for name in models)


def test_an_early_deadline_overtakes_and_a_late_block_does_not_hold_others_up():
    schedule = Schedule("deadline", max_active=3)
    for name, patience in (("slow", 10.0), ("urgent", 1.0), ("other", 20.0)):
        schedule.on(Joined(name, patience))
    assert schedule.on(Arrived("slow", 0.0)) == [Admit("slow"), Go("slow")]
    assert schedule.on(Arrived("other", 0.0)) == [Admit("other")]
    assert schedule.on(Arrived("urgent", 0.0)) == [Admit("urgent")]
    assert schedule.on(Reached("slow", True)) == [Go("urgent")]
    assert schedule.on(Reached("urgent", False)) == [Go("slow")]
    assert schedule.on(Reached("slow", False)) == [Go("other")]
    assert schedule.on(Ready("urgent")) == []
    assert schedule.on(Reached("other", True)) == [Go("urgent")]
    assert [schedule.urgency(name) for name in ("urgent", "slow", "other")] == [1.0, 10.0, 20.0]


def test_round_robin_waits_for_whose_turn_it_is():
    schedule = Schedule("round-robin", max_active=2)
    for name in ("a", "b"):
        schedule.on(Joined(name, 1.0))
        schedule.on(Arrived(name, 0.0))
    assert schedule.on(Reached("a", False)) == [Go("b")]
    assert schedule.on(Reached("b", True)) == []  # it is a's turn, whose block is late
    assert schedule.on(Ready("a")) == [Go("a")]


def test_a_stream_of_late_requests_starves_nobody():
    schedule = Schedule("deadline", max_active=1)
    schedule.on(Joined("pushy", 1.0))
    schedule.on(Joined("patient", 3.0))
    schedule.on(Arrived("pushy", 0.0, -100.0))
    schedule.on(Arrived("patient", 0.0))
    begun = []
    for now in range(1, 6):
        schedule.on(Arrived("pushy", float(now), -100.0))
        (admit, go) = schedule.on(Finished(begun[-1] if begun else "pushy"))
        begun.append(go.model)
        assert isinstance(admit, Admit)
    assert begun.index("patient") == 3  # due at 3: before what has come since


def test_change_drains_and_goes_on():
    schedule = Schedule("round-robin", max_active=1)
    schedule.on(Joined("a", 1.0))
    schedule.on(Arrived("a", 0.0))
    schedule.on(Arrived("a", 0.0))
    assert schedule.on(Changed("deadline", 0)) == []
    assert schedule.on(Finished("a")) == []
    assert schedule.active == 0
    assert schedule.on(Changed("deadline", 1)) == [Admit("a"), Go("a")]


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="round-robin or deadline"):
        Schedule("fifo", max_active=1)
    schedule = Schedule("deadline", max_active=1)
    schedule.on(Joined("a", 1.0))
    with pytest.raises(InputError, match="already"):
        schedule.on(Joined("a", 1.0))
    with pytest.raises(EngineError, match="idle, not running"):
        schedule.on(Finished("a"))
    schedule.on(Arrived("a", 0.0))
    with pytest.raises(EngineError, match="has left with 1 requests"):
        schedule.on(Left("a"))


NEEDS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(
        lambda pair: Need(least_bytes=pair[0], most_bytes=pair[0] + pair[1])
    ),
    min_size=1,
)


@settings(max_examples=300, deadline=None)
@given(needs=NEEDS, spare=st.integers(-500, 8000), data=st.data())
def test_quotas_never_exceed_the_budget(needs, spare, data):
    least = sum(need.least_bytes for need in needs.values())
    weights = {name: data.draw(st.one_of(st.just(0.0), st.floats(0.01, 100))) for name in needs}
    if spare < 0:
        with pytest.raises(BudgetError) as refusal:
            divide(least + spare, needs, weights)
        assert refusal.value.minimum_bytes == least
        return
    quotas = divide(least + spare, needs, weights)
    assert sum(quotas.values()) <= least + spare
    assert all(needs[name].least_bytes <= nbytes <= needs[name].most_bytes for name, nbytes in quotas.items())
    full = all(quotas[name] == needs[name].most_bytes for name in needs)
    assert full or sum(quotas.values()) == least + spare  # nothing lies idle
    busy = data.draw(st.sets(st.sampled_from(sorted(needs))))
    lent = lend(quotas, needs, busy)
    assert sum(lent.values()) <= sum(quotas.values())
    assert all(lent[name] >= quotas[name] for name in busy)
    assert all(lent[name] >= needs[name].least_bytes for name in needs)


def test_more_weight_more_bytes():
    needs = dict.fromkeys("ab", Need(least_bytes=10, most_bytes=1000))
    assert divide(220, needs, {"a": 3.0, "b": 1.0}) == {"a": 160, "b": 60}
    assert divide(1200, needs, {"a": 3.0, "b": 1.0}) == {"a": 895, "b": 305}
    assert divide(3000, needs, {"a": 3.0, "b": 1.0}) == {"a": 1000, "b": 1000}
    assert lend({"a": 160, "b": 60}, needs, {"b"}) == {"a": 10, "b": 210}
