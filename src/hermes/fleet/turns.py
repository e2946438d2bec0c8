"""The schedule under a lock, with the requests that it lets compute; and what a model pulls its blocks through."""

import functools
import threading
import time
from collections.abc import Callable, Set
from typing import Any

from hermes.engine import Engine
from hermes.errors import InputError
from hermes.fleet.lanes import Lanes
from hermes.fleet.schedule import (
    Admit,
    Arrived,
    Changed,
    Event,
    Finished,
    Go,
    Joined,
    Left,
    Policy,
    Reached,
    Ready,
    Schedule,
)
from hermes.model.source import SourceAround
from hermes.pipeload import Place

__all__ = ["TurnSource", "Turns"]


class Turns:
    """`Schedule` under a lock. Each method is one event, from any thread; turns are given out on `lanes`.

    The lock is held for microseconds, never over a read or a computation.

    Args:
        policy: as the schedule's.
        max_active: likewise.
        lanes: where models compute.
        clock: of arrivals and deadlines.

    Attributes:
        is_one_at_a_time: no request begins before the one under way is answered: it has every turn.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_active: int,
        lanes: Lanes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.is_one_at_a_time = max_active == 1
        self._lanes = lanes
        self._serve: dict[str, Callable[[Any], None]] = {}
        self._admitted: dict[str, Callable[[], None]] = {}
        self._leaving: set[str] = set()
        self._schedule = Schedule(policy, max_active=max_active)
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._closed = False
        self._keeper: str | None = None  # whose turns all are until the next event

    @property
    def models(self) -> Set[str]:
        """Who has joined, and not left."""
        return self._serve.keys()

    def join(self, model: str, patience_seconds: float, serve: Callable[[Any], None]) -> None:
        """A model has come; `serve` answers a request, and raises nothing. Raises InputError if its name is taken."""
        self._tell(Joined(model, patience_seconds))
        self._serve[model] = serve

    def leave(self, model: str) -> None:
        """A model goes, and takes no requests from now on. Blocks until those it has taken are answered."""
        with self._lock:
            self._leaving.add(model)
            try:
                while self._schedule.backlog(model) and not self._closed:
                    self._ended.wait()
                self._take_in(Left(model))
                del self._serve[model]
            finally:
                self._leaving.discard(model)

    def submit(self, model: str, request: Any, deadline_seconds: float | None) -> None:
        """A request has arrived, due so many seconds from now: it is served, or among those that `close` returns.

        Raises InputError where there is no such model, or no more turns.
        """
        now = self.clock()
        due = None if deadline_seconds is None else now + deadline_seconds
        with self._lock:
            if self._closed:
                raise InputError("the fleet is closed; make a new one")
            if model not in self._serve or model in self._leaving:
                raise InputError(f"there is no model {model!r} any more; add it again")
            self._take_in(Arrived(model, now, due, request))

    def reached(self, model: str, *, ready: bool) -> None:
        """Give the turn up, at a block boundary; `stand_by` follows."""
        self._tell(Reached(model, ready))

    def ready(self, model: str) -> None:
        """The block that is waited for is there."""
        self._tell(Ready(model))

    def finished(self, model: str) -> None:
        """Give the turn up: the request is answered, and `serve` about to return."""
        with self._lock:
            self._admitted.pop(model, None)
            self._take_in(Finished(model))

    def keeps(self, model: str) -> bool:
        """Within a turn: whether the next one is this model's, too, if its block is there. Most often costs nothing."""
        if self._keeper is None:
            with self._lock:
                self._keeper = model if self._schedule.keeps(model) else None
        return self._keeper == model

    def may_give_up(self) -> bool:
        """Within a turn: whether a request could go before this one, and would compute as it does alone."""
        return not self.is_one_at_a_time and self._lanes.may_wait()

    def stand_by(self) -> None:
        """Let others compute until the turn, which was given up, comes back."""
        self._lanes.wait()

    @property
    def running(self) -> str | None:
        """The model whose turn it is; without the lock, likewise below."""
        return self._schedule.running

    def urgency(self, model: str) -> float:
        """As in `Schedule`; for whoever may be a moment late."""
        return self._schedule.urgency(model)

    def backlog(self, model: str) -> int:
        """Requests that wait or are under way."""
        with self._lock:
            return self._schedule.backlog(model)

    def drain(self) -> None:
        """Begin no request any more, and wait until those under way are answered; `resume` goes on."""
        self._tell(Changed(self._schedule.policy, 0))
        with self._lock:
            while self._schedule.active and not self._closed:
                self._ended.wait()

    def resume(self, policy: Policy, max_active: int) -> None:
        """Begin what waits, in this way. After `drain`."""
        self.is_one_at_a_time = max_active == 1
        self._tell(Changed(policy, max_active))

    def close(self) -> list[Any]:
        """Give no more turns once the requests under way are answered; those that will never begin. Idempotent."""
        self.drain()
        with self._lock:
            waiting = [] if self._closed else self._schedule.waiting
            self._closed = True
            self._ended.notify_all()
            return waiting

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._take_in(event)

    def _take_in(self, event: Event) -> None:
        if self._closed:
            return
        self._keeper = None
        orders = self._schedule.on(event)
        self._ended.notify_all()
        for order in orders:
            match order:
                case Admit(model, request):
                    self._admitted[model] = functools.partial(self._serve[model], request)
                case Go(model):  # one that is admitted begins with its first turn
                    self._lanes.go(model, self._admitted[model])


class TurnSource(SourceAround):
    """An engine as its model sees it in a fleet: at each block boundary others may come first.

    The turn is given up while a block is on its way, so that one model's disk hides behind another's computation.
    `check` is called at each boundary, and raises what shall end the request.
    """

    def __init__(self, engine: Engine, turns: Turns, model: str, check: Callable[[], None]) -> None:
        super().__init__(engine)
        self._engine, self._turns, self._model, self._check = engine, turns, model, check

    @property
    def is_settled(self) -> bool:
        """As the engine's, where nobody could come first."""
        return self._turns.is_one_at_a_time and self._engine.is_settled

    def hold(self, block: int) -> bool:
        """As the engine's; returns when it is this model's turn."""
        self._check()
        engine, turns = self._engine, self._turns
        if engine.stays(block) and not turns.keeps(self._model) and turns.may_give_up():
            engine.release()
            turns.reached(self._model, ready=True)
            turns.stand_by()
        return engine.hold(block)

    def want(self, block: int) -> tuple[Place, ...]:
        """As the engine's; returns when the block is there and it is this model's turn."""
        engine, turns = self._engine, self._turns
        goes_on = turns.keeps(self._model) and engine.is_there(block)
        if not goes_on and turns.may_give_up():
            engine.release()
            is_there = engine.is_there(block)
            turns.reached(self._model, ready=is_there)
            if not is_there:
                engine.ask(block, lambda: turns.ready(self._model))
            turns.stand_by()
        return engine.want(block)

    def end_pass(self) -> None:
        """As the engine's; the last boundary of a pass."""
        super().end_pass()
        self._check()
