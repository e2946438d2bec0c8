"""PIPELOAD as a pure state machine: event in, orders out.

A *visit* is one trip of a block through the window: loads fetched, computed, released. Visits stand in a queue in the
order in which they were predicted; a table of successors, which learns from what the Inference Agent really asks for,
predicts the next one. So the ring runs on across passes, an encoder that runs once is left out of the decoder's later
passes, and any control flow is right: a wrong guess costs the bytes that were read ahead, never the result.
"""

from collections import deque
from collections.abc import Iterable, Sequence, Set

from hermes.errors import EngineError
from hermes.pipeload.events import (
    BlockDone,
    BlockForeseen,
    BlockForgotten,
    BlockWanted,
    Compute,
    Discard,
    Event,
    Fetch,
    LoadEvicted,
    LoadFetched,
    LoadKept,
    Order,
)
from hermes.pipeload.ring import Ring

__all__ = ["Pipeline", "smallest_ring"]


def smallest_ring(blocks: Iterable[Sequence[int]]) -> int:
    """Fewest ring bytes with which no order of visits can deadlock: the largest block, and a load of it once more.

    One block is held at a time, so the wanted block has the ring to itself at worst. Its loads lie one behind the other
    from where the first one was put; one that does not fit behind them begins at 0, and what is skipped at the end is
    smaller than that load. The first one is never it: in a ring that has become empty it lies at 0. So a block of one
    load needs no more than that load. `blocks` gives the slot bytes of each load that a block streams, in order.
    """
    return max((sum(loads) + max(loads[1:], default=0) for loads in blocks if loads), default=0)


class _Visit:
    """One trip of a block through the window."""

    __slots__ = ("block", "done", "leaving", "missing", "number", "offsets", "waiting")

    def __init__(self, number: int, block: int, waiting: Iterable[int]) -> None:
        self.number = number
        self.block = block
        self.waiting = deque(waiting)  # loads without room in the ring yet, in order
        self.offsets: dict[int, int] = {}  # of loads that have room, oldest first
        self.missing = 0  # loads ordered and not fetched yet
        self.done = False  # computed, skipped or abandoned
        self.leaving: list[int] = []  # resident loads to give back after it

    def finish(self) -> None:
        """Nobody needs it any more; room for what has none yet is never asked for."""
        self.done = True
        self.waiting.clear()


class Pipeline:
    """The Daemon Agent's decisions. Not thread-safe: the engine calls it under one lock, the simulation from one loop.

    Args:
        blocks: for each block, the slot bytes of each of its loads.
        resident: for each block, the loads that are fetched once, at its first visit, to a place of their own.
        ring_bytes: size of the window; at least `smallest_ring` of what is streamed.
        ahead: load ahead of the Inference Agent. False is the sequential engine (no overlap), the oracle.
        blocks_in_pass: only so many of the blocks are expected in a pass; the others are loaded when asked for.

    **Guarantees.** Reserved ring bytes never exceed `ring_bytes`. A visit computes only when all its loads are there,
    and its memory is given out again only after it is done and no agent still writes to it. Every wanted block is
    eventually computed if every fetch is eventually reported.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        resident: Sequence[Set[int]],
        ring_bytes: int,
        *,
        ahead: bool = True,
        blocks_in_pass: int | None = None,
    ) -> None:
        self._slot_bytes = blocks
        self._resident = [set(loads) for loads in resident]
        self._cold = [sorted(loads) for loads in resident]  # resident loads that were never fetched
        needed = smallest_ring(self._streamed(block) for block in range(len(blocks)))
        if ring_bytes < needed:
            raise EngineError(f"the window needs {needed} bytes, it has {ring_bytes}")
        self._ring = Ring(ring_bytes)
        self._ahead = ahead
        expected = blocks_in_pass or max(1, len(blocks))
        self._successor = [block + 1 if block + 1 < expected else 0 for block in range(len(blocks))]
        self._queue: deque[_Visit] = deque()  # oldest first; done ones linger until no agent writes to them
        self._under_way: list[deque[_Visit]] = [deque() for _ in blocks]  # the same, of each block
        self._visits: dict[int, _Visit] = {}
        self._number = 0
        self._current: _Visit | None = None  # what the Inference Agent holds
        self._wanted: _Visit | None = None  # what it waits for
        self._last_block: int | None = None

    def start(self, block: int = 0) -> list[Order]:
        """Begin to load before anyone asks, from `block` on."""
        if self._ahead and self._slot_bytes and not self._queue:
            self._push(block)
        return self._advance()

    def on(self, *events: Event) -> list[Order]:
        """Take events in; the orders that follow from them, in the order in which they are to be carried out."""
        orders: list[Order] = []
        for event in events:
            match event:
                case BlockWanted(block):
                    self._want(block)
                case LoadFetched(visit):
                    self._visits[visit].missing -= 1
                case BlockDone():
                    self._release()
                case BlockForeseen(block):
                    self._foresee(block)
                case BlockForgotten(block):
                    self._forget(block)
                case LoadEvicted(block, load):
                    orders += self._evict(block, load)
                case LoadKept(block, load):
                    self._keep(block, load)
        return orders + self._advance()

    def is_abandoned(self, visit: int) -> bool:
        """Whether a ring fetch ordered for this visit need not be carried out any more (but still reported)."""
        return self._visits[visit].done

    def is_there(self, block: int) -> bool:
        """Whether this block, wanted now, would be granted at once."""
        pending = (visit for visit in self._under_way[block] if not visit.done and visit is not self._current)
        visit = next(pending, None)
        return visit is not None and not visit.waiting and self._is_fetched(block)

    @property
    def is_held(self) -> bool:
        """Whether a block was wanted, granted, and is not done yet."""
        return self._current is not None

    def staying(self) -> frozenset[int]:
        """Blocks of which every load is resident and there: they need not be wanted, which changes nothing for them."""
        return frozenset(
            block
            for block, loads in enumerate(self._slot_bytes)
            if len(self._resident[block]) == len(loads) and not self._cold[block] and self._is_fetched(block)
        )

    def can_evict(self, block: int, load: int) -> bool:
        """Whether this load is resident, and the window would hold the block if it streamed it too."""
        if load not in self._resident[block]:
            return False
        return smallest_ring([self._streamed(block, load)]) <= self._ring.capacity_bytes

    def can_keep(self, block: int, load: int) -> bool:
        """Whether this load streams, and no visit that began while it was resident still looks at its old place."""
        leaving = any(load in visit.leaving for visit in self._under_way[block])
        return load not in self._resident[block] and not leaving

    def can_foresee(self) -> bool:
        """Whether everything ahead has room, so that one more block can be begun."""
        return not self._queue or not self._queue[-1].waiting

    def is_idle(self, block: int) -> bool:
        """Whether what it gives back can go at once: no visit of it is under way.

        A visit that is only foreseen, with nothing streamed for it or after it, is not under way: it is begun anew.
        """
        visits = len(self._under_way[block])
        return not visits or (visits == 1 and self._is_foreseen(block))

    @property
    def ring(self) -> Ring:
        """The window."""
        return self._ring

    def _streamed(self, block: int, evicted: int | None = None) -> list[int]:
        """Slot bytes of the loads that are not resident, or would not be any more, in order."""
        kept = self._resident[block]
        return [n for load, n in enumerate(self._slot_bytes[block]) if load not in kept or load == evicted]

    def _is_foreseen(self, block: int) -> bool:
        for visit in reversed(self._queue):
            if visit.done or visit.offsets or visit.missing or visit is self._current or visit is self._wanted:
                return False
            if visit.block == block:
                return True
        return False

    def _want(self, block: int) -> None:
        self._release()
        if self._last_block is not None:
            self._successor[self._last_block] = block
        self._last_block = block
        coming = (visit for visit in self._queue if not visit.done)
        for visit in coming:
            if visit.block == block:
                self._wanted = visit
                return
            visit.finish()  # skipped, or (where the block is not coming at all) abandoned
        self._wanted = self._push(block)

    def _foresee(self, block: int) -> None:
        if not self.can_foresee():
            raise EngineError(f"block {block}: no room, a block before it still waits for its own")
        self._push(block)

    def _forget(self, block: int) -> None:
        for visit in self._under_way[block]:
            if visit is not self._current and visit is not self._wanted:
                visit.finish()

    def _keep(self, block: int, load: int) -> None:
        if not self.can_keep(block, load):
            raise EngineError(f"load {load} of block {block} cannot be kept now")
        self._resident[block].add(load)
        self._cold[block].append(load)
        for visit in self._under_way[block]:
            if load in visit.waiting:  # that has no room for it yet: it does not stream any more
                visit.waiting.remove(load)

    def _release(self) -> None:
        for visit in (self._current, self._wanted):  # still wanted: the Inference Agent gave up waiting
            if visit is not None:
                visit.finish()
        self._current = self._wanted = None

    def _push(self, block: int) -> _Visit:
        streamed = (load for load in range(len(self._slot_bytes[block])) if load not in self._resident[block])
        visit = _Visit(self._number, block, streamed)
        self._number += 1
        self._visits[visit.number] = visit
        self._queue.append(visit)
        self._under_way[block].append(visit)
        return visit

    def _evict(self, block: int, load: int) -> list[Order]:
        if not self.can_evict(block, load):
            raise EngineError(f"load {load} of block {block} cannot be given back now")
        self._resident[block].remove(load)
        if load in self._cold[block]:
            self._cold[block].remove(load)
        if not self.is_idle(block):
            self._under_way[block][-1].leaving.append(load)
            return []
        if self._under_way[block]:  # foreseen only: begin that visit anew, with this load among those that stream
            orders: list[Order] = [Discard(block, load)]
            foreseen: _Visit | None = None
            while foreseen is None or foreseen.block != block:
                foreseen = self._queue.pop()
                self._under_way[foreseen.block].pop()
                del self._visits[foreseen.number]
                if earlier := self._under_way[foreseen.block]:  # it may be computed
                    earlier[-1].leaving += foreseen.leaving
                else:
                    orders += [Discard(foreseen.block, leaving) for leaving in foreseen.leaving]
            self._push(block)
            return orders
        return [Discard(block, load)]

    def _advance(self) -> list[Order]:
        orders = self._reclaim()
        while self._queue:
            last = self._queue[-1]
            orders += self._place(last)
            following = self._successor[last.block]
            if last.waiting or not self._ahead or self._under_way[following]:
                break
            self._push(following)
        wanted = self._wanted
        if wanted is not None and not wanted.waiting and self._is_fetched(wanted.block):
            self._current, self._wanted = wanted, None
            offsets = tuple(wanted.offsets.get(load) for load in range(len(self._slot_bytes[wanted.block])))
            orders.append(Compute(wanted.number, wanted.block, offsets))
        return orders

    def _is_fetched(self, block: int) -> bool:
        # An abandoned visit's resident loads may still be on their way, and nobody orders them twice.
        return not any(visit.missing for visit in self._under_way[block])

    def _place(self, visit: _Visit) -> list[Order]:
        """Order what the visit still needs, as far as there is room."""
        if visit.done:
            return []
        orders: list[Order] = [Fetch(visit.number, visit.block, load, None) for load in self._cold[visit.block]]
        self._cold[visit.block].clear()
        while visit.waiting:
            offset = self._ring.allocate(self._slot_bytes[visit.block][visit.waiting[0]])
            if offset is None:
                break
            load = visit.waiting.popleft()
            visit.offsets[load] = offset
            orders.append(Fetch(visit.number, visit.block, load, offset))
        visit.missing += len(orders)
        return orders

    def _reclaim(self) -> list[Order]:
        orders: list[Order] = []
        while self._queue and self._queue[0].done and not self._queue[0].missing:
            visit = self._queue.popleft()
            self._under_way[visit.block].popleft()
            del self._visits[visit.number]
            for offset in visit.offsets.values():
                self._ring.free(offset)
            orders += [Discard(visit.block, load) for load in visit.leaving]
        return orders
