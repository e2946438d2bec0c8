"""A model of a fleet: takes requests one after the other, waits for its turn, computes, answers."""

import contextlib
import copy
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from hermes.engine import LoadingAgents, forget_frames
from hermes.errors import EngineError, HermesError, ReadError
from hermes.fleet.answers import Answered, Totals
from hermes.fleet.turns import Turns, TurnSource
from hermes.memory.ledger import Ledger
from hermes.plan import Plan
from hermes.session import Prepared, Session, start_session

__all__ = ["KEPT_ANSWERS", "Request", "Worker"]

KEPT_ANSWERS = 1024
"""Each on its own; older ones are in the totals alone."""


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """A use of a model, and the future of who asked for it. `ended_by` stops it at its next block boundary."""

    call: Callable[[Any], Any]
    future: "Future[Any]"
    arrived_seconds: float
    deadline_seconds: float | None
    ended_by: HermesError | None = None

    def settle(self, result: Any, error: BaseException | None) -> None:
        """It is answered."""
        # A callback's Exception is logged by the future; its SystemExit would end the thread that computes for all.
        with contextlib.suppress(BaseException):
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)

    def cancel(self) -> None:
        """It will never begin."""
        with contextlib.suppress(SystemExit):  # of a callback: others wait to be told, too
            self.future.cancel()
        self.future.set_running_or_notify_cancel()


class Worker:
    """Runs one model. `submit` from any thread; `start` and `pause` while no request is under way (`Turns.drain`).

    `Turns` has `serve` called with each request that was submitted, one at a time, when it is its turn.

    What a request raises goes to its future, and the model goes on. Where its engine has failed (a file that cannot be
    read), its memory is given back, `failure` says why, and every further request gets that error.
    """

    def __init__(self, name: str, prepared: Prepared, turns: Turns) -> None:
        self.name = name
        self.prepared = prepared
        self.answered: deque[Answered] = deque(maxlen=KEPT_ANSWERS)  # the latest
        self.totals = Totals()
        self.failure: HermesError | None = None
        self.session: Session | None = None
        self.under_way: Request | None = None
        self._turns = turns
        self._read_before = 0  # by engines that are closed

    def start(self, plan: Plan, quota: Ledger, agents: LoadingAgents) -> None:
        """Begin to run with this plan; blocking until small weights are read. Where they cannot be, it has failed."""
        self.pause()
        if self.failure is None:
            try:
                self._start(plan, quota, agents)
            except HermesError as error:
                self.failure = copy.copy(error)

    def _start(self, plan: Plan, quota: Ledger, agents: LoadingAgents) -> None:
        self.session = start_session(
            self.prepared,
            plan,
            self.prepared.reader(),
            quota=quota,
            source=lambda engine: TurnSource(engine, self._turns, self.name, self._check),
            agents=agents,
            urgency=lambda: self._turns.urgency(self.name),
        )

    def submit(self, call: Callable[[Any], Any], deadline_seconds: float | None) -> "Future[Any]":
        """`call(module)` when its turn comes; never blocks. Raises InputError where the model has gone."""
        request = Request(
            call=call, future=Future(), arrived_seconds=self._turns.clock(), deadline_seconds=deadline_seconds
        )
        self._turns.submit(self.name, request, deadline_seconds)
        return request.future

    def pause(self) -> None:
        """Give all memory for weights back; `start` goes on."""
        if self.session is not None:
            self.session.close()
            self._read_before += self.session.stats.bytes_read
            self.session = None

    @property
    def bytes_read(self) -> int:
        """From disk, since the model has come."""
        session = self.session
        return self._read_before + (0 if session is None else session.stats.bytes_read)

    def fail(self, error: HermesError) -> None:
        """End the model for good, a request under way at its next block; from any thread."""
        self.failure = self.failure or error
        session = self.session
        if session is not None:
            session.engine.fail(error)

    def serve(self, request: Request) -> None:
        """Answer it, unless its owner has cancelled it. Raises nothing: what the request raises is its answer."""
        if not request.future.set_running_or_notify_cancel():
            self._turns.finished(self.name)
            return
        result: Any = None
        error: BaseException | None = None
        began = self._turns.clock()
        self.under_way = request
        try:
            result = self._compute(request.call)
        except BaseException as raised:
            error = raised
            self._learn_from(raised)
        self.under_way = None
        now = self._turns.clock()
        due = None if request.deadline_seconds is None else request.arrived_seconds + request.deadline_seconds
        answered = Answered(
            arrived_seconds=request.arrived_seconds,
            began_seconds=began,
            ended_seconds=now,
            failed=error is not None,
            late=due is not None and now > due,
        )
        self.answered.append(answered)
        self.totals = self.totals.plus(answered)
        self._turns.finished(self.name)
        request.settle(result, error)

    def _compute(self, call: Callable[[Any], Any]) -> Any:
        if self.failure is not None:
            raise copy.copy(self.failure)  # one that is raised again would gather the frames of every request
        if self.session is None:
            raise EngineError(f"{self.name} is not running; start the fleet")
        with torch.no_grad():
            return call(self.prepared.module)

    def _check(self) -> None:
        request = self.under_way
        if request is not None and request.ended_by is not None:
            raise copy.copy(request.ended_by)

    def _learn_from(self, raised: BaseException) -> None:
        """Let go of what it holds; and of the engine, where that is what has failed."""
        forget_frames(raised)  # whose locals may be views of weights
        if self.session is not None and (failure := _failure(raised, self.session)) is not None:
            self.failure = copy.copy(failure)
            self.pause()


def _failure(raised: BaseException, session: Session) -> HermesError | None:
    """What has ended the engine, if anything has: not what a request raises of its own, an OSError say."""
    if isinstance(raised, ReadError):
        return raised
    try:
        session.engine.raise_if_stopped()
    except HermesError as error:
        return error
    return None
