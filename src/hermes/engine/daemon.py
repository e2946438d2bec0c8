"""The Daemon Agent's eye on real memory: when it turns out tighter than planned, resident bytes go back."""

from dataclasses import dataclass

from hermes.errors import BudgetError
from hermes.memory.probe import mapped_bytes, resident_bytes
from hermes.units import format_budget, format_bytes

__all__ = [
    "WATCH_SECONDS",
    "FaultMeter",
    "MemorySample",
    "WorkingSet",
    "bytes_to_give_back",
    "outgrown",
    "too_large_a_pass",
]

WATCH_SECONDS = 0.05
"""Between two looks."""
FAULT_STEP_BYTES = 16 * 2**20
"""Given back at a time while the system evicts code pages that are needed again at once."""
FAULTS_PER_SECOND = 50
"""More than this is thrash: each waits for the disk, which may read megabytes around the page that was asked for."""


class WorkingSet:
    """Bytes that the process needs in memory: its own, and as much library code as it was ever seen to use.

    Code that the system has evicted to make room is missing from the resident set just when it matters.
    """

    def __init__(self) -> None:
        self._mapped_bytes = 0

    def __call__(self) -> int:
        """Now; some microseconds."""
        mapped = mapped_bytes()
        self._mapped_bytes = max(self._mapped_bytes, mapped)
        return resident_bytes() - mapped + self._mapped_bytes


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
        rate = (count - self._count) / elapsed
        lasting = min(rate, self._previous)
        self._count, self._start_seconds, self._previous = count, now_seconds, rate
        return lasting


def bytes_to_give_back(sample: MemorySample) -> int:
    """Resident weights to give up now: the excess over the limit, or one step while the system thrashes."""
    excess = sample.needed_bytes - sample.limit_bytes
    if excess > 0:
        return excess
    return FAULT_STEP_BYTES if sample.faults_per_second > FAULTS_PER_SECOND else 0


def outgrown(needed_bytes: int, budget_bytes: int, minimum_bytes: int) -> BudgetError:
    """The refusal to go on when nothing is left to give back."""
    return BudgetError(
        f"the process needs {format_bytes(needed_bytes)} and has no weights left to give back; its budget is "
        f"{format_bytes(budget_bytes)} (a longer text or a larger batch than was planned for?); "
        f"try --budget {format_budget(minimum_bytes)}",
        minimum_bytes=minimum_bytes,
    )


def too_large_a_pass(nbytes: int, budget_bytes: int, missing_bytes: int) -> BudgetError:
    """The refusal to begin a pass that takes `nbytes` besides weights, `missing_bytes` more than can be made free."""
    minimum = budget_bytes + missing_bytes
    return BudgetError(
        f"this pass takes {format_bytes(nbytes)} besides weights (a longer text or a larger batch than was planned "
        f"for), the budget of {format_bytes(budget_bytes)} leaves {format_bytes(nbytes - missing_bytes)}; "
        f"try --budget {format_budget(minimum)}",
        minimum_bytes=minimum,
    )
