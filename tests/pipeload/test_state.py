"""Laws 1 and 2 under random models, windows, control flow and disks: bounded, in order, never stuck."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.errors import EngineError
from hermes.pipeload import (
    BlockDone,
    BlockForeseen,
    BlockForgotten,
    BlockWanted,
    Compute,
    Discard,
    Fetch,
    LoadEvicted,
    LoadFetched,
    LoadKept,
    Pipeline,
    smallest_ring,
)

BLOCKS = st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=6)


class World:
    """Agents made of lists: fetches finish when, and in the order, the test says. Watches every promise on the way."""

    def __init__(self, blocks, resident, ring_bytes, **options):
        self.blocks = blocks
        self.resident = [set(loads) for loads in resident]
        self.ring_bytes = ring_bytes
        self.pipeline = Pipeline(blocks, resident, ring_bytes, **options)
        self.under_way = []
        self.log = []  # every fetch ever ordered
        self.fetched_resident = set()
        self.slots = {}  # visit -> {load: offset}; what is out of the ring, until the visit cannot be needed any more
        self.arrived = {}  # visit -> loads that are there
        self.leaving = set()
        self.late = set()  # kept while a visit may have had it in the ring
        self.granted = None
        self.held = None

    def take(self, orders):
        for order in orders:
            if isinstance(order, Discard):
                self.leaving.remove((order.block, order.load))
                assert (
                    self.granted is None
                    or self.granted.block != order.block
                    or (self.granted.offsets[order.load] is not None)
                )
                under_way = [(o.block, o.load) for o in self.under_way if o.offset is None]
                assert (order.block, order.load) not in under_way
                self.fetched_resident.discard((order.block, order.load))
            elif isinstance(order, Fetch):
                key = (order.block, order.load)
                if order.offset is None:
                    assert key not in {(o.block, o.load) for o in self.log if o.offset is None}
                else:
                    assert order.load not in self.resident[order.block]
                    self.slots.setdefault(order.visit, {})[order.load] = order.offset
                self.under_way.append(order)
                self.log.append(order)
            else:
                assert self.granted is None
                self.check(order)
                self.granted = order
                self.held = order.visit
        assert self.pipeline.ring.used_bytes <= self.ring_bytes
        self.check_overlap()

    def check(self, order):
        """A grant: everything of the visit is there."""
        assert isinstance(order, Compute)
        for load, offset in enumerate(order.offsets):
            if offset is None:
                assert (order.block, load) in self.fetched_resident  # and so never discarded
                assert load in self.resident[order.block] or (order.block, load) in self.leaving
            else:
                assert load not in self.resident[order.block] or (order.block, load) in self.late
                assert offset == self.slots[order.visit][load]
                assert load in self.arrived[order.visit]

    def check_overlap(self):
        """Nothing that is written to or computed from shares a byte with anything else."""
        busy = {}
        for order in self.under_way:
            if order.offset is not None:
                busy[order.visit, order.load] = (order.offset, self.blocks[order.block][order.load])
        if self.granted is not None:
            for load, offset in enumerate(self.granted.offsets):
                if offset is not None:
                    busy[self.granted.visit, load] = (offset, self.blocks[self.granted.block][load])
        spans = sorted(span for span in busy.values() if span[1])
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        assert all(a + n <= self.ring_bytes for a, n in spans)

    def start(self):
        self.take(self.pipeline.start())

    def want(self, block):
        self.granted = self.held = None
        self.take(self.pipeline.on(BlockWanted(block)))

    def done(self):
        self.granted = self.held = None
        self.take(self.pipeline.on(BlockDone()))

    def finish(self, index):
        order = self.under_way.pop(index)
        if order.offset is None:
            self.fetched_resident.add((order.block, order.load))
        elif not self.pipeline.is_abandoned(order.visit):
            self.arrived.setdefault(order.visit, set()).add(order.load)
        self.take(self.pipeline.on(LoadFetched(order.visit)))

    def evict(self, block, load):
        if not self.pipeline.can_evict(block, load):
            return False
        idle = self.pipeline.is_idle(block)
        assert not idle or self.granted is None or self.granted.block != block
        self.resident[block].remove(load)
        self.leaving.add((block, load))
        self.take(self.pipeline.on(LoadEvicted(block, load)))
        assert ((block, load) not in self.leaving) == idle
        return True

    def keep(self, block, load):
        if not self.pipeline.can_keep(block, load):
            return False
        assert (block, load) not in self.leaving
        self.resident[block].add(load)
        self.late.add((block, load))
        self.log = [o for o in self.log if (o.block, o.load, o.offset) != (block, load, None)]
        self.take(self.pipeline.on(LoadKept(block, load)))
        return True

    def compute(self, block, choose):
        """Want a block and wait: the disk must get there."""
        self.want(block)
        while self.granted is None:
            assert self.under_way, f"deadlock: block {block} is wanted and nobody reads"
            self.finish(choose(len(self.under_way)))
        assert self.granted.block == block


@st.composite
def worlds(draw, **options):
    blocks = draw(BLOCKS)
    resident = [draw(st.sets(st.sampled_from(range(len(loads))))) if loads else set() for loads in blocks]
    streamed = [[n for load, n in enumerate(b) if load not in keep] for b, keep in zip(blocks, resident, strict=True)]
    total = sum(map(sum, blocks))
    ring_bytes = smallest_ring(streamed) + draw(st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 2 * total)))
    chosen = {name: draw(strategy) for name, strategy in options.items()}
    return World(blocks, resident, ring_bytes, **chosen)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), world=worlds(ahead=st.booleans()), seed=st.integers(0, 2**32))
def test_any_control_flow_is_computed_within_bounds(data, world, seed):
    """Wants in any order, waits given up, passes given up, evictions, fetches finishing in any order."""
    del data
    random_ = random.Random(seed)
    choose = random_.randrange
    if random_.random() < 0.7:
        world.start()
    for _ in range(random_.randrange(40)):
        block = random_.randrange(len(world.blocks))
        match random_.choice(
            ["compute", "compute", "compute", "give up", "done", "read", "evict", "keep", "foresee", "forget"]
        ):
            case "compute":
                world.compute(block, choose)
            case "give up":
                world.want(block)
                for _ in range(random_.randrange(3)):
                    if world.under_way:
                        world.finish(choose(len(world.under_way)))
            case "done":
                world.done()
            case "read" if world.under_way:
                world.finish(choose(len(world.under_way)))
            case "evict" if world.resident[block]:
                world.evict(block, random_.choice(sorted(world.resident[block])))
            case "foresee" if world.pipeline.can_foresee():
                world.take(world.pipeline.on(BlockForeseen(block)))
            case "forget":
                world.take(world.pipeline.on(BlockForgotten(block)))
            case "keep" if len(world.resident[block]) < len(world.blocks[block]):
                streamed = set(range(len(world.blocks[block]))) - world.resident[block]
                world.keep(block, random_.choice(sorted(streamed)))
            case _:
                pass
    for block in range(len(world.blocks)):
        world.compute(block, choose)
    world.done()
    while world.under_way:
        world.finish(choose(len(world.under_way)))
    for block in range(len(world.blocks)):
        world.compute(block, choose)
    world.done()
    for block in range(len(world.blocks)):  # one round later at most, what was given back has gone
        world.compute(block, choose)
    assert not world.leaving


def test_what_a_block_that_is_computed_gives_back_waits_although_its_next_visit_is_begun_anew():
    world = World([[1], [1]], [{0}, {0}], 2)
    world.compute(0, lambda _: 0)
    while world.under_way:  # what comes next, of block 1, is only foreseen
        world.finish(0)
    world.take(world.pipeline.on(BlockForeseen(0)))
    assert world.evict(0, 0)
    assert world.evict(1, 0)  # at once: its visit, and block 0's behind it, are begun anew
    assert world.leaving == {(0, 0)}
    for block in (1, 0):
        world.compute(block, lambda _: 0)
    assert not world.leaving


@settings(max_examples=200, deadline=None)
@given(world=worlds(), seed=st.integers(0, 2**32), num_passes=st.integers(2, 5))
def test_steady_passes_read_every_streamed_load_once(world, seed, num_passes):
    choose = random.Random(seed).randrange
    world.start()
    for _ in range(num_passes):
        for block in range(len(world.blocks)):
            world.compute(block, choose)
        world.done()
    visits = sorted({order.visit for order in world.log if order.offset is not None})
    for visit in visits:
        (block,) = {order.block for order in world.log if order.visit == visit}
        ordered = [order.load for order in world.log if order.visit == visit and order.offset is not None]
        expected = [load for load in range(len(world.blocks[block])) if load not in world.resident[block]]
        assert ordered == (expected if visit != visits[-1] else expected[: len(ordered)])
    for block, loads in enumerate(world.blocks):
        for load in range(len(loads)):
            times = sum((order.block, order.load) == (block, load) for order in world.log)
            if load in world.resident[block]:
                assert times == 1
            else:  # once a pass, and once more where the ring has run on into the next
                assert num_passes <= times <= num_passes + 1


@settings(max_examples=100, deadline=None)
@given(world=worlds(ahead=st.just(False)), seed=st.integers(0, 2**32))
def test_the_sequential_engine_never_loads_ahead(world, seed):
    choose = random.Random(seed).randrange
    world.start()
    assert not world.log
    for _ in range(2):
        for block in range(len(world.blocks)):
            before = len(world.log)
            world.compute(block, choose)
            assert all(order.block == block for order in world.log[before:])
            assert not world.under_way
        before = len(world.log)
        world.done()
        assert len(world.log) == before


@settings(max_examples=100, deadline=None)
@given(world=worlds(), seed=st.integers(0, 2**32), num_in_pass=st.integers(1, 6))
def test_a_learned_order_is_read_without_waste(world, seed, num_in_pass):
    """Whatever the order of a pass is (blocks left out, turned round), from its third round on nothing is wasted."""
    random_ = random.Random(seed)
    order = random_.sample(range(len(world.blocks)), min(num_in_pass, len(world.blocks)))
    for _ in range(2):
        for block in order:
            world.compute(block, random_.randrange)
    first = len(world.log)
    computed = set()
    for _ in range(3):
        for block in order:
            world.compute(block, random_.randrange)
            computed.add(world.held)
        world.done()
    read = {fetch.visit for fetch in world.log[first:] if fetch.offset is not None}
    waiting = read - computed
    assert len(waiting) <= len(order)
    assert all(visit > max(computed) for visit in waiting)  # only what has been read ahead for the next pass


def test_it_reads_ahead_as_far_as_the_ring_goes_and_on_across_passes():
    world = World([[10], [10], [10], [10]], [set()] * 4, 30)
    world.start()
    assert [order.block for order in world.log] == [0, 1, 2]
    for block in (0, 1):
        world.compute(block, lambda _: 0)
    assert [order.block for order in world.log] == [0, 1, 2, 3]
    world.compute(2, lambda _: 0)
    assert [order.block for order in world.log] == [0, 1, 2, 3, 0]
    world.compute(3, lambda _: 0)
    world.done()
    assert [order.block for order in world.log] == [0, 1, 2, 3, 0, 1, 2]


def test_blocks_outside_the_pass_are_loaded_only_when_asked_for():
    world = World([[10], [10], [10]], [set()] * 3, 100, blocks_in_pass=2)
    world.start()
    assert {order.block for order in world.log} == {0, 1}
    world.compute(0, lambda _: 0)
    world.compute(2, lambda _: 0)
    assert 2 in {order.block for order in world.log}


def test_a_window_that_is_too_small_is_refused():
    assert smallest_ring([[3, 5], [6], []]) == 13
    assert smallest_ring([[5, 3], [9]]) == 11
    assert smallest_ring([[5, 3], [12]]) == 12
    assert smallest_ring([]) == 0
    Pipeline([[3, 5], [6], []], [set()] * 3, 13)
    with pytest.raises(EngineError, match="needs 13 bytes, it has 12"):
        Pipeline([[3, 5], [6], []], [set()] * 3, 12)
    Pipeline([[3, 5], [6], []], [{1}, set(), set()], 12)


def test_a_resident_load_still_on_its_way_is_waited_for_after_its_visit_was_given_up():
    world = World([[10], [10]], [{0}, {0}], 20)
    world.want(0)
    world.done()
    world.want(0)
    assert world.granted is None
    world.finish(0)
    assert world.granted is not None


def test_a_resident_load_is_given_back_although_its_visit_is_foreseen():
    """Fully resident, every block stands in the queue at any time; its memory must be there to be had all the same."""
    world = World([[10], [10], [10]], [{0}] * 3, 20)
    for block in range(3):
        world.compute(block, lambda _: 0)
    assert world.pipeline.is_idle(1)
    assert world.evict(1, 0)
    assert not world.leaving
    with pytest.raises(EngineError, match="load 0 of block 1 cannot be given back now"):
        world.pipeline.on(LoadEvicted(1, 0))
    for _ in range(2):
        for block in range(3):
            world.compute(block, lambda _: 0)
            assert (world.granted.offsets == (None,)) == (block != 1)


def test_a_resident_load_in_use_is_given_back_after_its_visit():
    world = World([[10], [10], [10]], [{0}, set(), set()], 20)
    world.compute(0, lambda _: 0)
    assert not world.pipeline.is_idle(0)
    assert world.evict(0, 0)
    assert world.leaving == {(0, 0)}
    assert not world.pipeline.can_evict(0, 0)
    world.want(1)
    assert not world.leaving
    for block in (1, 2, 0):
        world.compute(block, lambda _: 0)
    assert world.granted.offsets != (None,)


def test_a_resident_load_that_the_window_cannot_hold_is_kept():
    world = World([[10], [3]], [{0}, set()], 9)
    world.compute(0, lambda _: 0)
    world.compute(1, lambda _: 0)
    assert not world.pipeline.can_evict(0, 0)
    assert not world.pipeline.can_evict(1, 0)  # streams already
