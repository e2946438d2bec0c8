"""A model of a fleet: takes requests one after the other, waits for its turn, computes, answers."""

import contextlib
import queue
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import torch

from hermes.engine import LoadingAgents
from hermes.errors import EngineError, HermesError
from hermes.fleet.turns import Turns, TurnSource
from hermes.memory.ledger import Ledger
from hermes.plan import Plan
from hermes.session import Prepared, Session, start_session

__all__ = ["Answered", "Worker"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One request: when it came, began and ended, on the fleet's clock, and whether it failed or came too late."""

    arrived_seconds: float
    began_seconds: float
    ended_seconds: float
    failed: bool = False
    late: bool = False


@dataclass(frozen=True, kw_only=True)
class _Job:
    call: Callable[[Any], Any]
    future: "Future[Any]"
    arrived_seconds: float
    deadline_seconds: float | None


class Worker:
    """Runs one model. `submit` from any thread; `start` and `pause` while no request is under way (`Turns.drain`).

    `Turns` has `serve` called once for each request that was submitted, one at a time, when it is its turn.

    What a request raises goes to its future, and the model goes on. Where its engine has failed (a file that cannot be
    read), its memory is given back, `failure` says why, and every further request gets that error.
    """

    def __init__(self, name: str, prepared: Prepared, turns: Turns) -> None:
        self.name = name
        self.prepared = prepared
        self.answered: list[Answered] = []
        self.failure: BaseException | None = None
        self.session: Session | None = None
        self._turns = turns
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    def start(self, plan: Plan, quota: Ledger, agents: LoadingAgents) -> None:
        """Begin to run with this plan; blocking until small weights are read. Where they cannot be, it has failed."""
        self.pause()
        if self.failure is None:
            try:
                self._start(plan, quota, agents)
            except HermesError as error:
                self.failure = error

    def _start(self, plan: Plan, quota: Ledger, agents: LoadingAgents) -> None:
        self.session = start_session(
            self.prepared,
            plan,
            self.prepared.reader(),
            quota=quota,
            source=lambda engine: TurnSource(engine, self._turns, self.name),
            agents=agents,
            urgency=lambda: self._turns.urgency(self.name),
        )

    def submit(self, call: Callable[[Any], Any], deadline_seconds: float | None) -> "Future[Any]":
        """`call(module)` when its turn comes; never blocks."""
        job = _Job(call=call, future=Future(), arrived_seconds=self._turns.clock(), deadline_seconds=deadline_seconds)
        self._turns.announce(self.name, deadline_seconds)
        self._jobs.put(job)
        return job.future

    def pause(self) -> None:
        """Give all memory for weights back; `start` goes on."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def cancel(self) -> None:
        """Of what was submitted and has not begun; `Turns` is closed."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait().future.set_exception(CancelledError(f"{self.name}: the fleet was closed"))

    def serve(self) -> None:
        """Answer the oldest request. Raises nothing: what the request raises is its answer."""
        self._answer(self._jobs.get())

    def _answer(self, job: _Job) -> None:
        result: Any = None
        error: BaseException | None = None
        began = self._turns.clock()
        try:
            if self.failure is not None:
                raise self.failure
            if self.session is None:
                raise EngineError(f"{self.name} is not running; start the fleet")
            with torch.no_grad():
                result = job.call(self.prepared.module)
        except BaseException as raised:
            error = raised
            traceback.clear_frames(raised.__traceback__)  # whose locals may be views of weights
            if isinstance(raised, EngineError | OSError) and self.failure is None:
                self.failure = raised if isinstance(raised, HermesError) else EngineError(f"{self.name}: {raised}")
                self.pause()
        now = self._turns.clock()
        due = None if job.deadline_seconds is None else job.arrived_seconds + job.deadline_seconds
        self.answered.append(
            Answered(
                arrived_seconds=job.arrived_seconds,
                began_seconds=began,
                ended_seconds=now,
                failed=error is not None,
                late=due is not None and now > due,
            )
        )
        self._turns.finished(self.name)
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
