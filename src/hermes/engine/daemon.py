"""The Daemon Agent's eye on real memory: when it turns out tighter than planned, resident bytes go back."""

from dataclasses import dataclass

__all__ = ["MemorySample", "bytes_to_give_back"]

REFAULT_STEP_BYTES = 16 * 2**20
"""Given back at a time while the system evicts code pages that are needed again at once."""
REFAULTS_PER_SECOND = 500
"""More than this is thrash: 2 MB/s of code pages that a pass cannot do without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySample:
    """Memory at one moment, in bytes, as the system counts it.

    `limit_bytes` is what the process may hold: the budget, less the margin for what no counter sees in time.
    `refaults_per_second` counts pages that were evicted and had to be read again; 0 where it cannot be known.
    """

    resident_bytes: int
    limit_bytes: int
    refaults_per_second: float = 0.0


def bytes_to_give_back(sample: MemorySample) -> int:
    """Resident weights to give up now: the excess over the limit, or one step while the system thrashes."""
    excess = sample.resident_bytes - sample.limit_bytes
    if excess > 0:
        return excess
    return REFAULT_STEP_BYTES if sample.refaults_per_second > REFAULTS_PER_SECOND else 0
