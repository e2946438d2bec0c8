"""What the engine counts while it runs."""

from dataclasses import dataclass, field

__all__ = ["KEPT_PASSES", "EngineStats", "Span"]

KEPT_PASSES = 10_000
"""Whose seconds and bytes are kept: a model may serve requests for months."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something an agent did, for traces and profiles. Seconds on the engine's clock; `block` is what it computed."""

    agent: str
    name: str
    start_seconds: float
    end_seconds: float
    nbytes: int = 0
    block: int | None = None


@dataclass(kw_only=True)
class EngineStats:
    """Running totals; written under the engine's lock (`bytes_read`: the Loading Agents'), read whenever."""

    bytes_read: int = 0
    stall_seconds: float = 0.0
    passes: int = 0
    current_block: int | None = None
    """The one that inference holds, or held last."""
    pass_seconds: list[float] = field(default_factory=list)
    """Of the last `KEPT_PASSES`, as in the next two."""
    pass_bytes: list[int] = field(default_factory=list)
    pass_stall_seconds: list[float] = field(default_factory=list)
    evicted_bytes: int = 0
    spans: list[Span] = field(default_factory=list)
    """Empty unless the engine records."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, resident set bytes), as sampled by the Daemon Agent; empty unless the engine records."""
    _pass: tuple[float, int, float] | None = field(default=None, init=False, repr=False)
    """Of the one under way: when it began, and the totals of bytes and stalls then."""

    def begin_pass(self, now_seconds: float) -> None:
        """Count from here."""
        self._pass = (now_seconds, self.bytes_read, self.stall_seconds)

    def end_pass(self, now_seconds: float) -> bool:
        """Count a pass; False where none is under way."""
        if self._pass is None:
            return False
        start_seconds, nbytes, stall_seconds = self._pass
        self.passes += 1
        self.pass_seconds.append(now_seconds - start_seconds)
        self.pass_bytes.append(self.bytes_read - nbytes)
        self.pass_stall_seconds.append(self.stall_seconds - stall_seconds)
        for kept in (self.pass_seconds, self.pass_bytes, self.pass_stall_seconds):
            del kept[:-KEPT_PASSES]
        self._pass = None
        return True
