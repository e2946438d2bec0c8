"""What is kept of requests that were answered: each for a while, sums for good. Pure records."""

import math
from dataclasses import dataclass

__all__ = ["Answered", "Totals"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One request: when it came, began and ended, on the fleet's clock, and whether it failed or came too late."""

    arrived_seconds: float
    began_seconds: float
    ended_seconds: float
    failed: bool = False
    late: bool = False

    @property
    def latency_seconds(self) -> float:
        """From arrival to answer."""
        return self.ended_seconds - self.arrived_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Of all requests that were answered; as large for a million as for one."""

    requests: int = 0
    failed: int = 0
    late: int = 0
    latency_seconds: float = 0.0
    """Summed up."""
    worst_latency_seconds: float = 0.0
    first_arrived_seconds: float = math.inf
    last_ended_seconds: float = -math.inf

    def plus(self, one: Answered) -> "Totals":
        """With one more."""
        return Totals(
            requests=self.requests + 1,
            failed=self.failed + one.failed,
            late=self.late + one.late,
            latency_seconds=self.latency_seconds + one.latency_seconds,
            worst_latency_seconds=max(self.worst_latency_seconds, one.latency_seconds),
            first_arrived_seconds=min(self.first_arrived_seconds, one.arrived_seconds),
            last_ended_seconds=max(self.last_ended_seconds, one.ended_seconds),
        )
