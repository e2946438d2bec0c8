"""Packed weights that stay in memory as they lie on disk: read once, unpacked into the window at every visit.

A byte of the budget holds 1.4 times as many weights here as in the resident store, and costs unpacking instead of
nothing; the planner weighs that. To the state machine these are loads that stream.
"""

from collections.abc import Callable, Sequence, Set

from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.pipeload import Load

__all__ = ["Shelf", "Shelved"]


class Shelved:
    """One load's pieces, as they are read; `there` has the place of each that has been."""

    __slots__ = ("memory", "there", "users")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.there: set[int] = set()
        self.users = 0  # tickets under way


class Shelf:
    """Reserves and holds what is kept packed. The engine calls it under its lock; only `Shelved.there` is the agents'.

    Args:
        blocks: the loads of each block.
        packed: for each block, the numbers of those that stay packed; none at all where it is empty.
        ledger: its account "packed" is this shelf's.
        take_memory: gives so many bytes.

    Raises BudgetError from the constructor, before any memory is taken.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Load]],
        packed: Sequence[Set[int]],
        ledger: Ledger,
        *,
        take_memory: Callable[[int], Arena] = Arena,
    ) -> None:
        self.evicted_bytes = 0
        places: dict[tuple[int, int], tuple[int, int]] = {}
        end = 0
        for block, numbers in enumerate(packed):
            for number in sorted(numbers):
                places[block, number] = (end, blocks[block][number].read_bytes)
                end += blocks[block][number].read_bytes
        if end:
            ledger.reserve("packed", end)
        self._ledger = ledger
        self._arena = take_memory(end)
        self._places = places
        self._shelved = {
            key: Shelved(self._arena.view[offset : offset + nbytes]) for key, (offset, nbytes) in places.items()
        }

    def take(self, block: int, number: int) -> Shelved | None:
        """Where a load's pieces are kept, or are to be; None where they are not. `put_back` must follow."""
        shelved = self._shelved.get((block, number))
        if shelved is not None:
            shelved.users += 1
        return shelved

    def put_back(self, shelved: Shelved) -> None:
        """Nothing is read into it or unpacked from it any more."""
        shelved.users -= 1

    def evict(self, nbytes: int) -> int:
        """Give back loads that nobody is using, until `nbytes` are free; the bytes that are."""
        freed = 0
        for key in [key for key, shelved in self._shelved.items() if not shelved.users]:
            if freed >= nbytes:
                break
            del self._shelved[key]
            offset, size = self._places.pop(key)
            self._arena.discard(offset, size)
            freed += size
        if freed:
            self._ledger.reserve("packed", self._ledger.accounts["packed"] - freed)
        self.evicted_bytes += freed
        return freed

    def close(self) -> None:
        """Drop the memory."""
        self._shelved.clear()
        self._arena.close()
