"""PIPELOAD's decisions, without threads, clocks, files or tensors.

`Pipeline` is the state machine the engine's agents obey and the planner's simulation drives: event in, orders out.
`Ring` is the window that streamed blocks move through. Threads are in `hermes.engine`; time is in `hermes.plan`.
"""

from hermes.pipeload.events import (
    BlockDone,
    BlockForeseen,
    BlockForgotten,
    BlockWanted,
    Compute,
    Discard,
    Event,
    Fetch,
    LoadEvicted,
    LoadFetched,
    LoadKept,
    Order,
)
from hermes.pipeload.loads import Codec, Load, Piece, Place, plan_load
from hermes.pipeload.ring import Ring
from hermes.pipeload.state import Pipeline, smallest_ring

__all__ = [
    "BlockDone",
    "BlockForeseen",
    "BlockForgotten",
    "BlockWanted",
    "Codec",
    "Compute",
    "Discard",
    "Event",
    "Fetch",
    "Load",
    "LoadEvicted",
    "LoadFetched",
    "LoadKept",
    "Order",
    "Piece",
    "Pipeline",
    "Place",
    "Ring",
    "plan_load",
    "smallest_ring",
]
