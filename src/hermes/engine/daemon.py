"""The Daemon Agent's eye on real memory: when it turns out tighter than planned, resident bytes go back."""

from dataclasses import dataclass

__all__ = ["MemorySample", "RefaultMeter", "bytes_to_give_back"]

REFAULT_STEP_BYTES = 16 * 2**20
"""Given back at a time while the system evicts code pages that are needed again at once."""
REFAULTS_PER_SECOND = 2000
"""More than this is thrash: 8 MB/s of code pages that a pass cannot do without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySample:
    """Memory at one moment, in bytes, as the system counts it.

    `limit_bytes` is what the process may hold: the budget, less the margin for what no counter sees in time.
    `refaults_per_second` counts pages that were evicted and had to be read again; 0 where it cannot be known.
    """

    resident_bytes: int
    limit_bytes: int
    refaults_per_second: float = 0.0


class RefaultMeter:
    """Refaults a second that last: the lower of the rates of two windows in a row.

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
    excess = sample.resident_bytes - sample.limit_bytes
    if excess > 0:
        return excess
    return REFAULT_STEP_BYTES if sample.refaults_per_second > REFAULTS_PER_SECOND else 0
