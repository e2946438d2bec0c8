"""What an engine is told once, at its start."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

__all__ = ["EngineConfig"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the planner settled.

    Attributes:
        ring_bytes: the window.
        resident: for each block, its loads that stay in memory.
        packed: for each block, its loads that stay packed; none where this is empty.
        num_agents: Loading Agents.
        buffer_bytes: of each agent, for loads that cannot be read straight into place; 0 if there are none.
        ahead: False is the sequential engine.
        blocks_in_pass: how many of the blocks a pass is expected to visit; None is all.
        limit_bytes: the process's resident set above which resident weights are given back; None where the owner of
            several engines watches it, and calls `resize`.
        elastic: `resize` may let more loads stay.
        gives_back: False where weights that stay must not move: a device computes from where they lie.
        record: keep a span for each read and each block.
    """

    ring_bytes: int
    resident: Sequence[Set[int]]
    num_agents: int
    packed: Sequence[Set[int]] = ()
    buffer_bytes: int = 0
    ahead: bool = True
    blocks_in_pass: int | None = None
    limit_bytes: int | None
    elastic: bool = False
    gives_back: bool = True
    record: bool = False
