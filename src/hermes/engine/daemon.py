"""The Daemon Agent and its eye on real memory: when it turns out tighter than planned, resident bytes go back."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hermes.engine.config import EngineConfig
from hermes.engine.holdings import Holdings
from hermes.engine.stats import EngineStats
from hermes.errors import BudgetError
from hermes.memory.allocator import trim_heap
from hermes.memory.ledger import Ledger
from hermes.memory.pages import drop_read_around
from hermes.memory.probe import Cgroup, find_cgroup, major_faults, resident_and_mapped_bytes, resident_bytes
from hermes.units import format_budget, format_bytes

__all__ = [
    "WATCH_SECONDS",
    "DaemonAgent",
    "FaultMeter",
    "MemorySample",
    "ThrashWatch",
    "WorkingSet",
    "bytes_to_give_back",
]

WATCH_SECONDS = 0.05
"""Between two looks."""
TRIM_BYTES = 12 * 2**20
"""Free heap is given back from so much below the limit on, and again when as much more has come: between two looks a
batch with holes in its heap grew by as much."""
FAULT_STEP_BYTES = 16 * 2**20
"""Given back at a time while the system evicts code pages that are needed again at once."""
FAULTS_PER_SECOND = 50
"""More than this is thrash: each waits for the disk, which may read megabytes around the page that was asked for."""
FAULTS_TO_DROP = 8
"""What so many have read around is dropped: up to 64 MiB, where Linux reads 8 around each."""
FULL_BYTES = 32 * 2**20
"""A cgroup with less than this left is full: the next pages that are read take the place of others."""


class WorkingSet:
    """Bytes that the process needs in memory: its own, and as much library code as it was ever seen to use.

    Code that the system has evicted to make room is missing from the resident set just when it matters.
    """

    def __init__(self) -> None:
        self._mapped_bytes = 0
        self._trimmed_bytes = 0  # when heap was last given back

    def __call__(self) -> int:
        """Now; some microseconds."""
        resident, mapped = resident_and_mapped_bytes()
        self._mapped_bytes = max(self._mapped_bytes, mapped)
        return resident - mapped + self._mapped_bytes

    def trimmed(self, limit_bytes: int) -> int:
        """The same, free heap given back before it comes to the limit. Milliseconds, where there is any."""
        needed = self()
        if needed > min(limit_bytes, max(limit_bytes - TRIM_BYTES, self._trimmed_bytes + TRIM_BYTES)):
            trim_heap()
            needed = self._trimmed_bytes = self()
        return needed


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySample:
    """Memory at one moment, in bytes, as the system counts it.

    `limit_bytes` is what the process may hold: the budget, less the margin for what no counter sees in time.
    `faults_per_second` counts waits for pages that were evicted and must be read again; 0 where nothing evicts them.
    """

    needed_bytes: int
    limit_bytes: int
    faults_per_second: float = 0.0


class FaultMeter:
    """Faults a second that last: the lower of the rates of two windows in a row.

    A burst is no thrash: the first use of a library reads pages back too, once.
    """

    def __init__(self, count: int, now_seconds: float, *, window_seconds: float = 1.0) -> None:
        self._count = count
        self._start_seconds = now_seconds
        self._window_seconds = window_seconds
        self._previous = 0.0

    def rate(self, count: int, now_seconds: float) -> float:
        """The lasting rate at the end of each window, 0 in between. `count` is the counter's value now."""
        elapsed = now_seconds - self._start_seconds
        if elapsed < self._window_seconds:
            return 0.0
        latest = (count - self._count) / elapsed
        lasting = min(latest, self._previous)
        self._count, self._start_seconds, self._previous = count, now_seconds, latest
        return lasting


class ThrashWatch:
    """Library code that a cgroup's limit evicts and the process reads back; outside of one nothing evicts it.

    Called at every look: where the cgroup is full, what was read around each few faults leaves the page cache, lest it
    take the place of code that is in use. Returns the rate of faults that lasts all the same.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        cgroup = find_cgroup()
        self._cgroup = cgroup if cgroup is not None and cgroup.limit_bytes is not None else None
        self._clock = clock
        self._count = major_faults()  # when something was dropped last
        self._meter = FaultMeter(self._count, clock())

    def __call__(self) -> float:
        """Faults a second; 0 but at the end of each second."""
        if self._cgroup is None:
            return 0.0
        count = major_faults()
        if count - self._count >= FAULTS_TO_DROP and self._is_full(self._cgroup):
            drop_read_around()
            self._count = count
        return self._meter.rate(count, self._clock())

    def _is_full(self, cgroup: Cgroup) -> bool:
        return cgroup.charged_bytes() > (cgroup.limit_bytes or 0) - FULL_BYTES


def bytes_to_give_back(sample: MemorySample) -> int:
    """Resident weights to give up now: the excess over the limit, or one step while the system thrashes."""
    excess = sample.needed_bytes - sample.limit_bytes
    if excess > 0:
        return excess
    return FAULT_STEP_BYTES if sample.faults_per_second > FAULTS_PER_SECOND else 0


class DaemonAgent:
    """Looks at real memory every `WATCH_SECONDS`, in a thread of its own, and has weights given back when it is short.

    Args:
        lock: the engine's; held while a sample is taken and acted on.
        holdings: what may be given back.
        ledger: the budget.
        config: the limit; without one somebody else watches, and there is a thread for the record alone.
        stats: memory goes there if the run is recorded.
        on_error: told what stopped this agent; that weights do not suffice stops a pass, and is raised there.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        holdings: Holdings,
        ledger: Ledger,
        config: EngineConfig,
        stats: EngineStats,
        *,
        on_error: Callable[[BaseException], None],
        clock: Callable[[], float],
    ) -> None:
        self._lock = lock
        self._holdings = holdings
        self._ledger = ledger
        self._config = config
        self._stats = stats
        self._on_error = on_error
        self._clock = clock
        self._working_set = WorkingSet()
        self._shortage: BudgetError | None = None  # found in the pass under way, and not raised yet
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hermes-daemon", daemon=True)
        if config.limit_bytes is not None or config.record:
            self._thread.start()

    def begin_pass(self) -> None:
        """What was found before this one is nobody's any more."""
        self._shortage = None

    def raise_shortage(self) -> None:
        """Raise, once, the BudgetError that the thread came upon: it ends the pass under way, and the next may fit."""
        shortage, self._shortage = self._shortage, None
        if shortage is not None:
            raise shortage

    def end_pass(self) -> None:
        """Look now. Raises BudgetError where that, or the thread before, found too little to give back."""
        self.raise_shortage()
        self._balance()

    def close(self) -> None:
        """Stop and, from any other thread, join."""
        self._closed.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _balance(self, faults_per_second: float = 0.0) -> None:
        """Give free heap back, then weights as far as needed. Raises BudgetError when that is not enough."""
        limit_bytes = self._config.limit_bytes
        if limit_bytes is None:
            return
        with self._lock:
            # Under the lock: a figure from before an eviction would evict twice.
            needed = self._working_set.trimmed(limit_bytes)
            excess = bytes_to_give_back(
                MemorySample(needed_bytes=needed, limit_bytes=limit_bytes, faults_per_second=faults_per_second)
            )
            if excess and (freed := self._holdings.evict(excess)) < needed - self._ledger.budget_bytes:
                minimum_bytes = needed - freed + self._config.ring_bytes // 8
                raise _outgrown(needed, self._ledger.budget_bytes, minimum_bytes)

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # whatever stops an agent must stop the others, and be seen
            self._on_error(error)

    def _watch(self) -> None:
        thrash = ThrashWatch(self._clock)
        while not self._closed.wait(WATCH_SECONDS):
            rate = thrash()
            if self._config.record:
                with self._lock:
                    self._stats.memory.append((self._clock(), resident_bytes()))
            with self._lock:
                try:
                    self._balance(rate)
                except BudgetError as shortage:
                    self._shortage = shortage


def _outgrown(needed_bytes: int, budget_bytes: int, minimum_bytes: int) -> BudgetError:
    """The refusal to go on when nothing is left to give back."""
    return BudgetError(
        f"the process needs {format_bytes(needed_bytes)} and has no weights left to give back; its budget is "
        f"{format_bytes(budget_bytes)} (a longer text or a larger batch than was planned for?); "
        f"try --budget {format_budget(minimum_bytes)}",
        minimum_bytes=minimum_bytes,
    )
