"""Whose turn it is to compute: several models' requests as a pure state machine, event in, orders out.

One model computes at a time, on all cores: two at once would halve each other, and their activations would add up to no
end. What overlaps is one model's disk with another's computation. A turn lasts until the next block boundary.

The thread is in `lanes`, time in `predict`, which drives the same machine.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal, get_args

from hermes.errors import EngineError, InputError

__all__ = [
    "POLICIES",
    "Admit",
    "Arrived",
    "Changed",
    "Event",
    "Finished",
    "Go",
    "Joined",
    "Left",
    "Order",
    "Policy",
    "Reached",
    "Ready",
    "Schedule",
]

Policy = Literal["round-robin", "deadline"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class Joined:
    """A model has come. Its requests are due `patience_seconds` after they arrive, unless they say otherwise."""

    model: str
    patience_seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """A model has gone, whose requests are all answered."""

    model: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request, at a time on the caller's clock, due at `deadline_seconds` on the same clock (None: by patience).

    `Admit` hands `request` back, whatever it is.
    """

    model: str
    now_seconds: float
    deadline_seconds: float | None = None
    request: Any = None


@dataclass(frozen=True, slots=True)
class Reached:
    """The model whose turn it is has come to a block boundary; `ready` says whether the next block is loaded."""

    model: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """The block that a model waits for is loaded."""

    model: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The model whose turn it is has finished its request, or has failed."""

    model: str


@dataclass(frozen=True, slots=True)
class Admit:
    """The model's oldest request may begin, once it is its turn."""

    model: str
    request: Any = None


@dataclass(frozen=True, slots=True)
class Go:
    """It is the model's turn to compute."""

    model: str


@dataclass(frozen=True, slots=True)
class Changed:
    """Another policy, or another number of requests at once; 0 lets those under way end, and begins none."""

    policy: Policy
    max_active: int


Event = Joined | Left | Arrived | Reached | Ready | Finished | Changed
Order = Admit | Go


class _State(Enum):
    IDLE = "idle"
    WAITING = "waiting"  # for its block
    READY = "ready"
    RUNNING = "running"


@dataclass(kw_only=True)
class _Model:
    patience_seconds: float
    state: _State = _State.IDLE
    deadline: float = 0.0
    """Of the request under way."""
    queue: deque[tuple[float, Any]] = field(default_factory=deque)
    """Deadlines of the requests that wait, and these, oldest first."""

    @property
    def due(self) -> float:
        """The earliest deadline of all: whoever is first in line inherits it from those behind, who wait for it."""
        under_way = [] if self.state is _State.IDLE else [self.deadline]
        return min([*under_way, *(deadline for deadline, _ in self.queue)], default=float("inf"))


class Schedule:
    """Not thread-safe: `turns` calls it under one lock, `predict` from one loop.

    Args:
        policy: "round-robin": block by block in a fixed rotation, which waits for a block that is late (SwapNet).
            "deadline": the earliest deadline among those whose block is there; nobody waits while another could go on.
        max_active: requests that may be under way at once; their activations are all in memory.

    **Guarantees.** One model has the turn at a time; at most `max_active` are under way. While a request waits and
    every `Go` is followed by `Reached` or `Finished`, every unready `Reached` by `Ready`, there is always one order
    outstanding: no deadlock. A model's own requests are answered in order. With "deadline", no model is begun, or has a
    turn, on behalf of a request that arrives after the deadline of another's that could be instead; with "round-robin"
    each has a turn in each rotation. So none starves.
    """

    def __init__(self, policy: Policy, *, max_active: int) -> None:
        if policy not in POLICIES or max_active < 1:
            raise InputError(f"policy {policy!r} with {max_active} at once; try {' or '.join(POLICIES)}, and 1 or more")
        self.policy = policy
        self.max_active = max_active
        self._models: dict[str, _Model] = {}  # in the order of the rotation
        self._running: str | None = None
        self._last: str | None = None

    def on(self, event: Event) -> list[Order]:
        """Take one event in; the orders that follow."""
        match event:
            case Joined(name, patience):
                if name in self._models:
                    raise InputError(f"there is a model {name!r} already; give the other one another name")
                self._models[name] = _Model(patience_seconds=patience)
            case Left(name):
                if backlog := self.backlog(name):
                    raise EngineError(f"{name} has left with {backlog} requests to answer")
                del self._models[name]
            case Arrived(name, now, deadline, request):
                model = self._models[name]
                # Never before its arrival: or a stream of requests that are late already could starve the others.
                due = now + model.patience_seconds if deadline is None else max(now, deadline)
                model.queue.append((due, request))
            case Reached(name, ready):
                self._stop(name, _State.READY if ready else _State.WAITING)
            case Ready(name):
                self._expect(name, _State.WAITING)
                self._models[name].state = _State.READY
            case Finished(name):
                self._stop(name, _State.IDLE)
            case Changed(policy, max_active):
                self.policy, self.max_active = policy, max_active
        return self._advance()

    def urgency(self, model: str) -> float:
        """Deadline of what the model is at, or of what it will be at next; infinite without requests.

        Reads for the smallest go first. Any thread may ask.
        """
        found = self._models.get(model)
        if found is None or self.policy == "round-robin":
            return 0.0
        return found.due

    def keeps(self, model: str) -> bool:
        """Whether the model whose turn it is would have the next one, too, were its next block ready."""
        self._expect(model, _State.RUNNING)
        return self._next_turn(model) == model

    @property
    def active(self) -> int:
        """Requests that are under way."""
        return sum(model.state is not _State.IDLE for model in self._models.values())

    def backlog(self, model: str) -> int:
        """Requests that wait or are under way."""
        found = self._models.get(model)
        return 0 if found is None else len(found.queue) + (found.state is not _State.IDLE)

    @property
    def waiting(self) -> list[Any]:
        """Requests that have not begun."""
        return [request for model in self._models.values() for _, request in model.queue]

    @property
    def running(self) -> str | None:
        """The model whose turn it is."""
        return self._running

    def _stop(self, name: str, state: _State) -> None:
        self._expect(name, _State.RUNNING)
        self._models[name].state = state
        self._running, self._last = None, name

    def _expect(self, name: str, state: _State) -> None:
        if self._models[name].state is not state:
            raise EngineError(f"{name} is {self._models[name].state.value}, not {state.value}")

    def _advance(self) -> list[Order]:
        orders: list[Order] = []
        while (name := self._next_admitted()) is not None:
            model = self._models[name]
            (model.deadline, request), model.state = model.queue.popleft(), _State.READY
            orders.append(Admit(name, request))
        if self._running is None and (name := self._next_turn(self._last)) is not None:
            self._models[name].state = _State.RUNNING
            self._running = name
            orders.append(Go(name))
        return orders

    def _next_admitted(self) -> str | None:
        waiting = [n for n, model in self._models.items() if model.state is _State.IDLE and model.queue]
        if self.active >= self.max_active or not waiting:
            return None
        if self.policy == "deadline":
            return min(waiting, key=lambda name: self._models[name].due)
        return min(waiting, key=partial(self._rotation, self._last))

    def _next_turn(self, last: str | None) -> str | None:
        """Whose turn follows one of `last`, which counts as ready if it still has it."""
        active = [name for name, model in self._models.items() if model.state is not _State.IDLE]
        ready = [name for name in active if self._models[name].state in (_State.READY, _State.RUNNING)]
        if self.policy == "deadline":
            return min(ready, key=lambda name: (self._models[name].due, name != last), default=None)
        following = min(active, key=partial(self._rotation, last), default=None)
        return following if following in ready else None

    def _rotation(self, last: str | None, name: str) -> int:
        """How many places after `last` this one comes."""
        names = list(self._models)
        return (names.index(name) - (names.index(last) if last in names else -1) - 1) % len(names)
