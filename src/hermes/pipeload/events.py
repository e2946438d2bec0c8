"""What happens (events, past tense) and what is to be done (orders, imperative)."""

from dataclasses import dataclass

__all__ = [
    "BlockDone",
    "BlockForeseen",
    "BlockForgotten",
    "BlockWanted",
    "Compute",
    "Discard",
    "Event",
    "Fetch",
    "LoadEvicted",
    "LoadFetched",
    "LoadKept",
    "Order",
]


@dataclass(frozen=True, slots=True)
class BlockWanted:
    """The Inference Agent has come to this block; whatever it held before is done."""

    block: int


@dataclass(frozen=True, slots=True)
class BlockForeseen:
    """Somebody outside says that this block comes after all that is under way: begin to load it, as room allows."""

    block: int


@dataclass(frozen=True, slots=True)
class BlockForgotten:
    """What was foreseen of this block is not wanted after all: its memory goes back to the window."""

    block: int


@dataclass(frozen=True, slots=True)
class LoadFetched:
    """A Loading Agent has put one load of a visit into place (or skipped it, the visit being abandoned)."""

    visit: int


@dataclass(frozen=True, slots=True)
class BlockDone:
    """The Inference Agent needs nothing any more: the pass is over. PIPELOAD's *destroy*."""


@dataclass(frozen=True, slots=True)
class LoadEvicted:
    """A resident load is to be given back: visits that begin from now on stream it. `Discard` follows, now or later."""

    block: int
    load: int


@dataclass(frozen=True, slots=True)
class LoadKept:
    """A streamed load has got a place to stay: it is fetched there with the next visit that has not begun it."""

    block: int
    load: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Loading Agents: read load number `load` of `block` into the ring at `offset`, or to its resident place (None)."""

    visit: int
    block: int
    load: int
    offset: int | None


@dataclass(frozen=True, slots=True)
class Compute:
    """Inference Agent: the wanted block is there. PIPELOAD's *compute-ready*.

    `offsets` has one entry for each load of the block: where in the ring it lies, None for a resident one.
    """

    visit: int
    block: int
    offsets: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Daemon Agent: nobody looks at this load's resident place any more, nor ever will; its memory can go."""

    block: int
    load: int


Event = BlockWanted | BlockForeseen | BlockForgotten | LoadFetched | BlockDone | LoadEvicted | LoadKept
Order = Fetch | Compute | Discard
