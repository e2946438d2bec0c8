"""What stays in memory between passes, and how it goes when room is needed: resident weights, packed ones, heap."""

import weakref
from collections.abc import Callable, Sequence

from hermes.engine.config import EngineConfig
from hermes.engine.residents import Residents
from hermes.engine.shelf import Shelf
from hermes.engine.stats import EngineStats
from hermes.errors import BudgetError
from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.pipeload import Event, Load, LoadEvicted, LoadKept, Pipeline
from hermes.units import format_budget, format_bytes

__all__ = ["Holdings"]


class Holdings:
    """Reserves and holds it. Not thread-safe: the engine calls it under its lock.

    Args:
        blocks: the loads of each block.
        pinned: loads that are never given back.
        ledger: the engine's.
        config: what is kept.
        pipeline: knows what may go.
        stats: bytes that were given back are counted there.
        take_in: gives the pipeline an event, and carries out what follows.
        before_evicting: called when something may be given back.
        take_memory: gives so many bytes.

    Raises BudgetError from the constructor, before any memory is taken.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Load]],
        pinned: Sequence[Load],
        ledger: Ledger,
        config: EngineConfig,
        pipeline: Pipeline,
        stats: EngineStats,
        take_in: Callable[[Event], None],
        *,
        before_evicting: Callable[[], None],
        take_memory: Callable[[int], Arena] = Arena,
    ) -> None:
        self.residents = Residents(
            blocks, config.resident, pinned, ledger, elastic=config.elastic, take_memory=take_memory
        )
        self.shelf = Shelf(blocks, config.packed, ledger, take_memory=take_memory)
        self._ledger = ledger
        self._pipeline = pipeline
        self._stats = stats
        self._take_in = take_in
        self._before_evicting = before_evicting
        self._gives_back = config.gives_back
        self._heap_bytes = 0  # that passes were found to take; reserved as far as there is room yet
        self._late: list[tuple[weakref.ref[object], int]] = []  # what `take` gave, and its bytes

    @property
    def store(self) -> Arena:
        """Where resident loads lie."""
        return self.residents.store

    def evict(self, nbytes: int, *, at_once: bool = False) -> int:
        """Give packed weights back, then resident ones, until `nbytes` are free; the bytes that are, or will be.

        None of them where the configuration says that they stay.
        """
        if not self._gives_back:
            return 0
        if nbytes > 0:
            self._before_evicting()
        freed = self.shelf.evict(nbytes)
        self._count_evicted()
        return freed + self.residents.evict(nbytes - freed, self._pipeline, self._give_back, at_once=at_once)

    def keep_more(self) -> None:
        """Let loads that stream stay from now on, as far as the ledger has room."""
        self.residents.keep(self._ledger.free_bytes, self._pipeline, self._keep)

    def discard(self, block: int, load: int) -> None:
        """Nobody uses a resident load any more."""
        self.residents.discard(block, load)
        self._count_evicted()
        self._grow_heap()

    def take(self, nbytes: int) -> Arena:
        """Memory that was not planned for, from what is kept if there is no room left: `Engine.take`."""
        self._count_late()
        # Anew each time: heap that waits for room has what comes free first.
        while (missing := nbytes - self._ledger.free_bytes) > 0 and self.evict(missing, at_once=True):
            pass
        self._ledger.reserve("late", self._ledger.accounts.get("late", 0) + nbytes)
        arena = Arena(nbytes)
        self._late.append((arena.reference(), nbytes))
        return arena

    def reserve_heap(self, nbytes: int) -> None:
        """Have room for a pass that outgrows the plan; what blocks under way still hold comes as they let go of it.

        Raises BudgetError where it cannot fit.
        """
        self._count_late()
        missing = nbytes - self._ledger.accounts.get("heap", 0) - self._ledger.free_bytes
        if missing > 0 and (freed := self.evict(missing)) < missing:
            raise _too_large_a_pass(nbytes, self._ledger.budget_bytes, missing - freed)
        self._heap_bytes = max(self._heap_bytes, nbytes)
        self._grow_heap()

    def close(self) -> None:
        """Drop the memory."""
        self.store.close()
        self.shelf.close()

    def _grow_heap(self) -> None:
        heap_bytes = self._ledger.accounts.get("heap", 0)
        self._ledger.reserve("heap", max(heap_bytes, min(self._heap_bytes, heap_bytes + self._ledger.free_bytes)))

    def _count_late(self) -> None:
        """Memory that was taken is reserved for as long as somebody has it."""
        if self._late:
            self._late = [(memory, nbytes) for memory, nbytes in self._late if memory() is not None]
            self._ledger.reserve("late", sum(nbytes for _, nbytes in self._late))

    def _count_evicted(self) -> None:
        self._stats.evicted_bytes = self.residents.evicted_bytes + self.shelf.evicted_bytes

    def _give_back(self, block: int, load: int) -> None:
        self._take_in(LoadEvicted(block, load))

    def _keep(self, block: int, load: int) -> None:
        self._take_in(LoadKept(block, load))


def _too_large_a_pass(nbytes: int, budget_bytes: int, missing_bytes: int) -> BudgetError:
    """The refusal to begin a pass that takes `nbytes` besides weights, `missing_bytes` more than can be made free."""
    minimum = budget_bytes + missing_bytes
    return BudgetError(
        f"this pass takes {format_bytes(nbytes)} besides weights (a longer text or a larger batch than was planned "
        f"for), the budget of {format_bytes(budget_bytes)} leaves {format_bytes(nbytes - missing_bytes)}; "
        f"try --budget {format_budget(minimum)}",
        minimum_bytes=minimum,
    )
