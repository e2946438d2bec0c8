"""One engine for every run: it owns the arenas, the agents and the ledger, and carries out `Pipeline`'s orders.

**Threads and locks.** The Inference Agent is whoever calls `want` and `end_pass`: one thread at a time. Loading Agents
report what is fetched; the Daemon Agent is in `daemon`. `_lock` guards the state machine, the ledger and the
statistics; it is never held over a read or a computation. The agents' own queue lock is taken inside it, never the
other way round.

What is fetched is noted without the lock, and taken in with the next event: it gives no room, so nothing that could be
done waits for it, unless somebody waits for a block.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from hermes.checkpoint.readers import Reader
from hermes.engine.agents import Line, LoadingAgents, Ticket, forget_frames
from hermes.engine.config import EngineConfig
from hermes.engine.daemon import DaemonAgent
from hermes.engine.holdings import Holdings
from hermes.engine.shelf import Shelved
from hermes.engine.stats import EngineStats, Span
from hermes.errors import EngineError, HermesError
from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.pipeload import (
    BlockDone,
    BlockForeseen,
    BlockForgotten,
    BlockWanted,
    Compute,
    Discard,
    Event,
    Fetch,
    Load,
    LoadFetched,
    Order,
    Pipeline,
    Place,
)

__all__ = ["Engine"]


class Engine:
    """Streams blocks through a bounded window for one model.

    Args:
        blocks: the loads of each block, in the order of a pass.
        pinned: loads that are kept from start to end and belong to no block.
        reader: closed with the engine.
        ledger: window, resident and buffer bytes are reserved here before any memory is taken.
        take_memory: gives so many bytes for what stays, then for the window.
        agents: shared with other engines, and as many as `config` says; None: of its own.
        urgency: of its reads among theirs.

    Attributes:
        held: the block that is computed.

    Raises:
        BudgetError: from the constructor, when they do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Load]],
        *,
        pinned: Sequence[Load],
        reader: Reader,
        ledger: Ledger,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        take_memory: Callable[[int], Arena] = Arena,
        agents: LoadingAgents | None = None,
        urgency: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.stats = EngineStats()
        self.clock = clock
        self.ledger = ledger
        self._blocks = blocks
        self._reader = reader
        self._config = config
        ledger.reserve("window", config.ring_bytes)
        ledger.reserve("buffers", config.buffer_bytes * config.num_agents)
        self._pipeline = Pipeline(
            [[load.slot_bytes for load in loads] for loads in blocks],
            config.resident,
            config.ring_bytes,
            ahead=config.ahead,
            blocks_in_pass=config.blocks_in_pass,
        )
        self._holdings = Holdings(
            blocks,
            pinned,
            ledger,
            config,
            self._pipeline,
            self.stats,
            self._take_in,
            before_evicting=self._before_evicting,
            take_memory=take_memory,
        )
        self.store = self._holdings.store
        self.ring = take_memory(config.ring_bytes)
        self._lock = threading.RLock()
        self._ready = threading.Condition(self._lock)
        self._granted: Compute | None = None
        self._asked: int | None = None
        self._on_ready: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._block_start = 0.0
        self.held: int | None = None
        self._staying: frozenset[int] = frozenset()
        self._fetched: deque[tuple[int, Shelved | None]] = deque()  # visits, and what goes back to the shelf
        self._agents = agents or LoadingAgents(config.num_agents)
        self._owns_agents = agents is None
        self._line = Line(
            self._agents,
            reader,
            buffer_bytes=config.buffer_bytes,
            on_error=self.fail,
            on_read=self._record_read if config.record else None,
            stats=self.stats,
            clock=clock,
            urgency=urgency,
        )
        self._daemon = DaemonAgent(
            self._lock, self._holdings, ledger, config, self.stats, on_error=self.fail, clock=clock
        )

    # ------------------------------------------------------------------ the Inference Agent's side

    def start(self) -> list[Place]:
        """Fetch what is pinned (blocking), then begin to load the first pass. Places of the pinned loads, in order."""
        self.fetch(self._holdings.residents.pinned_slots())
        with self._lock:
            self._carry_out(self._pipeline.start())
        return self._holdings.residents.pinned_places()

    def fetch(self, loads: Sequence[tuple[Load, memoryview]]) -> None:
        """Read loads into memory of the caller's, before anything else that is queued; blocks until they are there.

        **Guarantee.** While the engine runs, nothing is written to that memory any more once this returns or raises.
        """
        if not loads:
            return
        left = len(loads)
        abandoned = False

        def on_done(_: Ticket) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                if not left:
                    self._ready.notify_all()

        tickets = [
            Ticket(
                load=load,
                slot=slot,
                on_done=on_done,
                is_abandoned=lambda: abandoned,
            )
            for load, slot in loads
        ]
        start = self.clock()
        with self._lock:
            self.raise_if_stopped()
            self._line.submit(tickets, urgent=True)
            try:
                while left:
                    self.raise_if_stopped()
                    self._ready.wait()
            except BaseException:
                abandoned = True
                while left and not self.is_stopped:
                    self._ready.wait()
                raise
            self.stats.stall_seconds += self.clock() - start

    def take(self, nbytes: int) -> Arena:
        """Memory for weights that stay but were not planned for; from resident ones if the budget has no room left.

        Raises BudgetError where that does not suffice.
        """
        with self._lock:
            return self._holdings.take(nbytes)

    def want(self, block: int) -> tuple[Place, ...]:
        """Release what is held, and block until every load of `block` is in memory; their places, in order.

        Raises:
            ReadError: a file of the checkpoint could not be read, vanished or changed.
            EngineError: another agent failed, or the engine is closed.
            BudgetError: once, where the Daemon Agent saw in this pass what `end_pass` would.
        """
        with self._lock:
            self.raise_if_stopped()
            start = self.clock()
            if self._asked != block:
                self._daemon.raise_shortage()  # never after `ask`: the Copy Agent has no pass to end
                self._ask(block, start)
            self._asked = None
            while self._granted is None:
                self.raise_if_stopped()
                self._ready.wait()
            granted: Compute = self._granted
            self._block_start = self.clock()
            self.held = self.stats.current_block = block
            stalled = self._block_start - start
            self.stats.stall_seconds += stalled
            if self._config.record and stalled > 1e-5:
                self.stats.spans.append(Span("inference", "wait", start, self._block_start))
            return tuple(
                Place(resident=False, offset=offset + load.data_offset)
                if offset is not None
                else self._holdings.residents.place(block, number)
                for number, (load, offset) in enumerate(zip(self._blocks[block], granted.offsets, strict=True))
            )

    def ask(self, block: int, on_ready: Callable[[], None]) -> None:
        """The first half of `want`, which is to follow: release what is held, and have the block loaded. Never blocks.

        `on_ready` is called once, as soon as `want` would not block: by whichever thread, inside the engine's lock.
        """
        with self._lock:
            self._on_ready = on_ready
            if self.is_stopped:
                self._say_ready()
            else:
                self._ask(block, self.clock())

    @property
    def is_settled(self) -> bool:
        """Whether no block needs to be wanted."""
        return len(self._staying) == len(self._blocks)

    def stays(self, block: int) -> bool:
        """Whether every load of the block is resident, and was there when the last pass ended."""
        return block in self._staying

    def hold(self, block: int) -> bool:
        """What `want` does, for a block that stays; else False. Takes no lock where the block before it stays, too.

        Once it no longer stays, it is not given back before another block is held or wanted.
        """
        if block not in self._staying:
            return False
        if self._pipeline.is_held:
            self.release()
        self.held = self.stats.current_block = block
        return block in self._staying  # still: `_before_evicting` ends that first, and looks at what is held then

    def places(self, block: int) -> tuple[Place, ...]:
        """Where the loads of a block lie that stays, or stayed when that was last asked: what is there, `hold` says."""
        with self._lock:
            return tuple(self._holdings.residents.place(block, number) for number in range(len(self._blocks[block])))

    def begin_pass(self, heap_bytes: int = 0) -> None:
        """A sweep over the blocks begins, which takes so many bytes besides weights.

        Where that is more than was planned, resident weights are given back before it grows. Raises ReadError if a file
        has changed since it was opened, and BudgetError if the pass cannot fit.
        """
        self._reader.check()
        with self._lock:
            self.raise_if_stopped()
            self._holdings.reserve_heap(heap_bytes)
            self._daemon.begin_pass()
            self.stats.begin_pass(self.clock())

    def end_pass(self) -> None:
        """The sweep is over, or was given up: release what is held, and look at real memory.

        Raises ReadError if a file changed while it was read, and BudgetError where the process has outgrown its budget
        and no resident weights are left to give back.
        """
        with self._lock:
            self._release(self.clock())
            self._take_in(BlockDone())
            if not self._config.record and not self.is_stopped and not self.is_settled:
                self._staying = self._pipeline.staying()
        self.count_pass()

    def count_pass(self) -> None:
        """The rest of `end_pass`, for who goes on holding a block. Raises as it does."""
        with self._lock:
            was_running = self.stats.end_pass(self.clock()) and not self.is_stopped
        if was_running:
            self._reader.check()
        self._daemon.end_pass()

    def count_stall(self, seconds: float) -> None:
        """Somebody waited for what the engine had brought, on its further way."""
        with self._lock:
            self.stats.stall_seconds += seconds

    def foresee(self, block: int) -> bool:
        """Begin to load a block before it is wanted; False where the window has no room to begin with. Never blocks."""
        with self._lock:
            self.raise_if_stopped()
            self._take_in_fetched()
            if possible := self._pipeline.can_foresee():
                self._take_in(BlockForeseen(block))
            return possible

    def is_there(self, block: int) -> bool:
        """Whether `want` would return at once."""
        with self._lock:
            self._take_in_fetched()
            return self._pipeline.is_there(block)

    def release(self) -> None:
        """Give the memory of the block that is held, and of one that is waited for, back to the window."""
        with self._lock:
            self._release(self.clock())
            self._take_in(BlockDone())

    def forget(self, block: int) -> None:
        """Take back what `foresee` has begun for this block."""
        with self._lock:
            self._take_in(BlockForgotten(block))

    def resize(self, budget_bytes: int) -> int:
        """Let the ledger have another budget; what it has from now on. Resident loads go, or (if `elastic`) come.

        More than was asked where what streams cannot do with less, or a block under way still needs what it has; ask
        again later. Never blocks.
        """
        with self._lock:
            self.raise_if_stopped()
            self._take_in_fetched()
            self._holdings.evict(self.ledger.reserved_bytes - budget_bytes)
            self.ledger.resize(max(budget_bytes, self.ledger.reserved_bytes))
            if self._config.elastic:
                self._holdings.keep_more()
            return self.ledger.budget_bytes

    def close(self) -> None:
        """Stop and join every agent, drop the memory, close the files. Idempotent; raises nothing an agent raised."""
        with self._lock:
            self._closed.set()
            self._staying = frozenset()
            self._say_ready()
        self._line.close()
        if self._owns_agents:
            self._agents.close()
        self._daemon.close()
        self.ring.close()
        self._holdings.close()
        self._reader.close()

    def _ask(self, block: int, now: float) -> None:
        self._release(now)
        self._granted, self._asked = None, block
        self._take_in(BlockWanted(block))

    def _say_ready(self) -> None:
        """To whoever wants a block: it is there, or never will be."""
        self._ready.notify_all()
        on_ready, self._on_ready = self._on_ready, None
        if on_ready is not None:
            on_ready()

    def _release(self, now: float) -> None:
        if self.held is not None and self._config.record:
            self.stats.spans.append(Span("inference", f"block {self.held}", self._block_start, now, 0, self.held))
        self.held = self._asked = None

    def _before_evicting(self) -> None:
        """Blocks that stayed may stream from now on; the pipeline learns that one of them is held."""
        self._take_in_fetched()
        self._staying = frozenset()  # first: whoever goes on to another block afterwards wants it
        if self.held is not None and not self._pipeline.is_held:
            self._take_in(BlockWanted(self.held))

    @property
    def is_stopped(self) -> bool:
        """Whether something failed, or the engine is closed. Without a lock."""
        return self._error is not None or self._closed.is_set()

    def raise_if_stopped(self) -> None:
        """What failed, anew at each call, or EngineError where the engine is closed. Without a lock."""
        if self._error is not None:
            if isinstance(self._error, HermesError):
                raise copy.copy(self._error) from self._error
            raise EngineError(f"an agent failed: {self._error!r}") from self._error
        if self._closed.is_set():
            raise EngineError("the engine is closed; load the model again")

    # ------------------------------------------------------------------ the Loading Agents' side

    def _carry_out(self, orders: Sequence[Order]) -> None:
        tickets = []
        for order in orders:
            match order:
                case Fetch():
                    tickets.append(self._ticket(order))
                case Compute():
                    self._granted = order
                    self._say_ready()
                case Discard():
                    self._holdings.discard(order.block, order.load)
        if tickets:
            self._line.submit(tickets)

    def _take_in(self, *events: Event) -> None:
        fetched: list[Event] = []
        while self._fetched:
            visit, shelved = self._fetched.popleft()
            if shelved is not None:
                self._holdings.shelf.put_back(shelved)
            fetched.append(LoadFetched(visit))
        self._carry_out(self._pipeline.on(*fetched, *events))

    def _take_in_fetched(self) -> None:
        if self._fetched:
            self._take_in()

    def _ticket(self, order: Fetch) -> Ticket:
        load = self._blocks[order.block][order.load]
        shelved = None if order.offset is None else self._holdings.shelf.take(order.block, order.load)

        def fetched(_: Ticket) -> None:
            self._fetched.append((order.visit, shelved))
            if self._granted is None:  # asked after it is noted, as `_ask` says that it waits before it looks
                with self._lock:
                    self._take_in_fetched()

        def is_abandoned() -> bool:  # without the lock: the visit is there until this load is reported
            return order.offset is not None and self._pipeline.is_abandoned(order.visit)

        arena, offset = (
            (self.store, self._holdings.residents.slot(order.block, order.load))
            if order.offset is None
            else (self.ring, order.offset)
        )
        slot = arena.view[offset : offset + load.slot_bytes]
        return Ticket(
            load=load,
            slot=slot,
            on_done=fetched,
            is_abandoned=is_abandoned,
            stays=order.offset is None,
            shelved=shelved,
        )

    def _record_read(self, agent: str, ticket: Ticket, nbytes: int, start: float, end: float) -> None:
        with self._lock:
            self.stats.spans.append(Span(agent, ticket.load.name, start, end, nbytes))

    def fail(self, error: BaseException) -> None:
        """This stopped an agent, or somebody on the way behind the engine: everything else stops with it."""
        forget_frames(error)
        with self._lock:
            self._error = self._error or error
            self._staying = frozenset()
            self._say_ready()
