"""The resident store: loads that stay in memory between passes, where they lie, and which of them go first."""

from collections.abc import Callable, Sequence, Set

from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.pipeload import Load, Pipeline, Place

__all__ = ["Residents"]


class Residents:
    """Reserves and holds what is kept. Not thread-safe: the engine calls it under its lock.

    Args:
        blocks: the loads of each block.
        kept: for each block, the numbers of those that stay.
        pinned: loads that stay and belong to no block; never given back.
        ledger: its account "resident" is this store's.
        elastic: have a place (addresses, no memory) for every load, so that more can be kept later.
        take_memory: gives so many bytes.

    Raises BudgetError from the constructor, before any memory is taken.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Load]],
        kept: Sequence[Set[int]],
        pinned: Sequence[Load],
        ledger: Ledger,
        *,
        elastic: bool = False,
        take_memory: Callable[[int], Arena] = Arena,
    ) -> None:
        self.evicted_bytes = 0
        self._blocks = blocks
        self._ledger = ledger
        self._leaving_bytes = 0  # given back, and still in use
        self._slots: dict[tuple[int, int], int] = {}  # (block, load) -> offset in the store
        self._pinned: list[tuple[Load, int]] = []
        offset = 0
        for load in pinned:
            self._pinned.append((load, offset))
            offset += load.slot_bytes
        for block, loads in enumerate(kept):
            for number in sorted(loads):
                self._slots[block, number] = offset
                offset += blocks[block][number].slot_bytes
        ledger.reserve("resident", offset)
        self._spare: dict[tuple[int, int], int] = {}  # (block, load) that streams -> offset, if it came to stay
        streamed = [(block, number) for block, loads in enumerate(blocks) for number in range(len(loads))]
        for block, number in streamed if elastic else ():
            if (block, number) not in self._slots:
                self._spare[block, number] = offset
                offset += blocks[block][number].slot_bytes
        self.store = take_memory(offset)

    def pinned_slots(self) -> list[tuple[Load, memoryview]]:
        """What is pinned, and the memory it goes to."""
        return [(load, self.store.view[offset : offset + load.slot_bytes]) for load, offset in self._pinned]

    def pinned_places(self) -> list[Place]:
        """Where it lies, in order."""
        return [Place(resident=True, offset=offset + load.data_offset) for load, offset in self._pinned]

    def slot(self, block: int, number: int) -> int:
        """Offset of a load's slot."""
        return self._slots[block, number]

    def place(self, block: int, number: int) -> Place:
        """Where a load's bytes lie, or lay and would lie again: it is always the same place."""
        offset = self._slots[block, number] if (block, number) in self._slots else self._spare[block, number]
        return Place(resident=True, offset=offset + self._blocks[block][number].data_offset)

    def evict(self, nbytes: int, pipeline: Pipeline, give_back: Callable[[int, int], None], *, at_once: bool) -> int:
        """Give loads back, from the block that keeps most, until `nbytes` are free; the bytes that are, or will be.

        What a block under way still needs is counted (unless `at_once`) and goes when that visit is over.
        """
        freed = 0 if at_once else self._leaving_bytes
        sizes: dict[int, int] = {}
        for block, number in self._slots:
            sizes[block] = sizes.get(block, 0) + self._blocks[block][number].slot_bytes
        candidates = sorted(self._slots, key=lambda key: -sizes[key[0]])
        for idle in (True,) if at_once else (True, False):
            for block, number in candidates:
                if freed >= nbytes:
                    return freed
                if pipeline.can_evict(block, number) and (pipeline.is_idle(block) or not idle):
                    slot_bytes = self._blocks[block][number].slot_bytes
                    self._leaving_bytes += slot_bytes
                    freed += slot_bytes
                    give_back(block, number)
        return freed

    def keep(self, nbytes: int, pipeline: Pipeline, keep: Callable[[int, int], None]) -> int:
        """Let loads that stream stay from now on, from the block that streams most; bytes taken, `nbytes` at most.

        Raises BudgetError where the ledger has no such room.
        """
        taken = 0
        sizes: dict[int, int] = {}
        for block, number in self._spare:
            sizes[block] = sizes.get(block, 0) + self._blocks[block][number].slot_bytes
        for block, number in sorted(self._spare, key=lambda key: -sizes[key[0]]):
            slot_bytes = self._blocks[block][number].slot_bytes
            if taken + slot_bytes <= nbytes and pipeline.can_keep(block, number):
                self._ledger.reserve("resident", self._ledger.accounts["resident"] + slot_bytes)
                self._slots[block, number] = self._spare.pop((block, number))
                self.store.keep_apart(self._slots[block, number], slot_bytes)  # its neighbours may never come
                taken += slot_bytes
                keep(block, number)
        return taken

    def discard(self, block: int, number: int) -> None:
        """Nobody uses the load any more: its memory goes."""
        slot_bytes = self._blocks[block][number].slot_bytes
        offset = self._slots.pop((block, number))
        self.store.discard(offset, slot_bytes)
        self._spare[block, number] = offset
        self._ledger.reserve("resident", self._ledger.accounts["resident"] - slot_bytes)
        self._leaving_bytes -= slot_bytes
        self.evicted_bytes += slot_bytes
