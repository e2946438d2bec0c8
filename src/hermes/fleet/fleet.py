"""Several models under one budget (SwapNet): `Fleet` prepares them, divides the bytes, and runs their requests."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from hermes.device import find_device
from hermes.engine import LoadingAgents
from hermes.errors import BudgetError, HermesError, InputError
from hermes.fleet.lanes import Lanes, drop_kernel_threads
from hermes.fleet.measuring import SLACK_BYTES, measure_candidate, measuring_bytes
from hermes.fleet.members import Candidate
from hermes.fleet.newcomer import have_parts_in_common, prepare_newcomer, skeleton_bytes
from hermes.fleet.plan import FleetPlan, plan_fleet
from hermes.fleet.report import FleetReport, ModelReport, make_report
from hermes.fleet.schedule import POLICIES, Policy
from hermes.fleet.shares import Shares
from hermes.fleet.turns import Turns
from hermes.fleet.worker import Worker
from hermes.memory.allocator import hold_heap, keep_heap_tight
from hermes.memory.pages import Code, code_in_use, drop_idle_pages, fetch_code
from hermes.memory.probe import peak_resident_bytes, resident_bytes
from hermes.model.binding import HOST
from hermes.session import (
    MARGIN_BYTES,
    Prepared,
    Workload,
    memory_limit,
    shared_target,
)
from hermes.units import parse_bytes

__all__ = ["Fleet", "FleetReport", "ModelReport"]

MATRIX_BYTES = 16 * 2**20
"""Larger matrices are computed by ranges of rows, or no quota below twice their size would do."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A model that has come.

    Attributes:
        candidate: as the planner sees it.
        worker: runs it.
        code: of libraries, what its passes use.
        late_bytes: of its skeleton, where the floor was measured before it came.
    """

    candidate: Candidate
    worker: Worker
    code: Code
    late_bytes: int


class Fleet:
    """Models that share a budget, each with the output it would have alone. A context manager; `close` ends it.

        with hermes.Fleet(budget="1GiB") as fleet:
            fleet.add("detector", detector, "yolov3.safetensors", example_args=(picture,), importance=2)
            fleet.add("encoder", "models/minilm")
            answer = fleet.submit("detector", picture)      # a concurrent.futures.Future
            boxes = answer.result()

    Each model is an engine with a quota of its own. Quotas and floor never sum to more than the budget (one ledger).
    One model computes at a time; while it does, the others' blocks are read. A request that raises, or a model whose
    file is damaged, fails alone.

    Args:
        budget: bound on the resident set of this process, "1GiB" or bytes; a cgroup's tighter limit holds instead.
        policy: of the turns, "round-robin" (SwapNet's) or "deadline"; "auto" takes the one with the shorter predicted
            round.
        max_active: requests that may be under way at once (their activations are all in memory); None: what is best.
        elastic: lend the bytes of models without requests to those that have some.
        device: to compute on; one that shares the host's memory ("cuda" on a Jetson). Weights stay where they are
            there, nothing is lent. Inputs are given on it; example inputs anywhere.

    Raises InputError, BudgetError.
    """

    def __init__(
        self,
        *,
        budget: str | int,
        policy: str = "auto",
        max_active: int | None = None,
        elastic: bool = True,
        device: str = "cpu",
    ) -> None:
        self.budget_bytes = parse_bytes(budget)
        self.device = find_device(device)
        shared_target(self.device)  # or it is refused
        if policy not in (*POLICIES, "auto"):
            raise InputError(f"policy {policy!r} is none of {', '.join(POLICIES)}, auto")
        keep_heap_tight()
        hold_heap(self.budget_bytes)  # while models are measured, as they will run
        self._policy: Policy | None = next((name for name in POLICIES if name == policy), None)
        self._max_active = max_active
        self._members: dict[str, _Member] = {}
        self._plan: FleetPlan | None = None  # by which they run
        self._lanes = Lanes(self.device.type)
        self._turns = Turns(POLICIES[0], max_active=1, lanes=self._lanes)
        self._shares = Shares(MARGIN_BYTES, self._turns, elastic=elastic and self.device == HOST)
        self._agents: LoadingAgents | None = None
        self._floor_bytes = 0  # when it began to run
        self._changing = threading.RLock()
        self._closed = False

    # ------------------------------------------------------------------ who is in it

    def add(
        self,
        name: str,
        model: nn.Module | str | Path,
        checkpoint: str | Path | None = None,
        *,
        importance: float = 1.0,
        deadline_seconds: float | None = None,
        example_args: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        sequence_length: int = 128,
        max_new_tokens: int = 0,
        matrix_bytes: int = MATRIX_BYTES,
        resident_bytes: int | None = None,
    ) -> None:
        """Bring a model in; while others run, too: they wait for the moment in which bytes are divided anew.

        Its computing time is measured by a few passes (a stored profile of a transformers model is taken instead).

        Args:
            name: to submit to.
            model: a module with its `checkpoint`, as `hermes.stream` takes them; or as `hermes.load` takes it.
            checkpoint: state-dict file of a module.
            importance: weight when bytes are shared out; its requests are due sooner by this factor.
            deadline_seconds: after arrival, for each of its requests; None: by importance.
            example_args: of a module's forward; needed for a module.
            example_kwargs: likewise.
            batch_size: sequences at a time that a transformers model is prepared for.
            sequence_length: tokens of each, likewise.
            max_new_tokens: likewise; 0 where forward alone is called.
            matrix_bytes: matrices of linear layers above this are computed by ranges of rows.
            resident_bytes: weights that may stay in memory between its requests; 0 reads all of them for each, through
                a window that takes the model's whole quota (SwapNet); None: what is best. A model smaller than its
                smallest window stays.

        Raises:
            InputError: a name or a module taken twice, an importance that is not positive, negative `resident_bytes`.
            BudgetError: not even the smallest windows fit; the fleet stays as it was.
            CheckpointError, ModelError, ReadError: as they say; likewise.
        """
        with self._change():
            self._check_new(name, model, importance, deadline_seconds, resident_bytes)
            prepared, call = prepare_newcomer(
                name,
                model,
                checkpoint,
                example_args=example_args,
                example_kwargs=example_kwargs,
                workload=Workload(
                    batch_size=batch_size, sequence_length=sequence_length, max_new_tokens=max_new_tokens
                ),
                matrix_bytes=matrix_bytes,
                device=self.device,
            )
            was = self._plan
            try:
                if was is not None:
                    self._make_room(prepared, was)
                candidate = measure_candidate(
                    prepared,
                    call,
                    limit_bytes=self.budget_bytes,
                    alone=was is None,
                    importance=importance,
                    deadline_seconds=deadline_seconds,
                    resident_bytes=resident_bytes,
                )
                member = _Member(
                    candidate=candidate,
                    worker=Worker(name, prepared, self._turns),
                    code=code_in_use() if prepared.known is None else prepared.known.code,
                    late_bytes=0 if was is None else skeleton_bytes(prepared),
                )
                if was is None:
                    self._members = {**self._members, name: member}
                else:
                    self._settle({**self._members, name: member})
            except BaseException:
                if was is not None:
                    with contextlib.suppress(HermesError):  # or it would hide what has gone wrong
                        self._run(self._members, was)
                raise

    def remove(self, name: str) -> None:
        """Let a model go once its requests are answered; its bytes go to the others. Raises InputError."""
        with self._change():
            gone = self._member(name)
            rest = {other: member for other, member in self._members.items() if other != name}
            if name in self._turns.models:
                self._turns.leave(name)
                gone.worker.pause()
                self._shares.let_go(name)
            self._members = rest
            if not rest:
                self._plan = None
            elif self._plan is not None:
                self._settle(rest)

    def start(self) -> FleetPlan:
        """Divide the bytes and start the engines; `submit` does it where nobody has. Returns the plan.

        Raises BudgetError, with the smallest budget that works. Blocking until small weights are read.
        """
        with self._change():
            if self._closed:
                raise InputError("the fleet is closed; make a new one")
            if self._plan is None:
                if not self._members:
                    raise InputError("the fleet has no models; add some first")
                self._floor_bytes = self._measure_floor()
                self._settle({name: replace(member, late_bytes=0) for name, member in self._members.items()})
            return self.plan

    # ------------------------------------------------------------------ what it does

    def submit(self, name: str, *args: Any, deadline_seconds: float | None = None, **kwargs: Any) -> "Future[Any]":
        """`model(*args, **kwargs)` when its turn comes; the future has its output, or what it raised. Never blocks.

        `deadline_seconds` from now, else the model's own. Raises InputError for a model that is not there.
        """
        return self.call(name, lambda module: module(*args, **kwargs), deadline_seconds=deadline_seconds)

    def call(
        self, name: str, function: Callable[[Any], Any], *, deadline_seconds: float | None = None
    ) -> "Future[Any]":
        """The same for any use of a model, as `lambda model: model.generate(...)`.

        It runs on the one thread that computes for all models, and so do callbacks of the future: neither may wait for
        another request of this fleet, nor change it.
        """
        if self._closed:
            raise InputError("the fleet is closed; make a new one")
        if self._plan is None:
            self.start()
        member = self._member(name)
        own = member.candidate.deadline_seconds
        return member.worker.submit(function, own if deadline_seconds is None else deadline_seconds)

    @property
    def plan(self) -> FleetPlan:
        """What is settled. Raises InputError before `start`, and where no model is left."""
        if self._plan is None:
            raise InputError("the fleet has not started; call start() first")
        return self._plan

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """The models as the planner sees them: costs and activations, as measured."""
        return {name: member.candidate for name, member in self._members.items()}

    @property
    def quotas(self) -> Mapping[str, int]:
        """Bytes for weights that each model has now, what was lent included."""
        return self._shares.quotas

    def report(self) -> FleetReport:
        """What was measured so far, beside what was predicted for as many requests of each model."""
        plan = self.plan
        workers = {name: member.worker for name, member in self._members.items() if name in plan.plans}
        return make_report(plan, workers, peak_resident_bytes())

    def close(self) -> None:
        """End all: requests under way are answered, those that wait are cancelled. Idempotent."""
        with self._change():
            self._closed = True
            self._shares.close()
            waiting = self._turns.close()
            self._lanes.close()
            for member in self._members.values():
                member.worker.pause()
            if self._agents is not None:
                self._agents.close()
            for request in waiting:
                request.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ how

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        if self._lanes.is_own_thread:  # it would wait for itself
            raise InputError("a request or its callback cannot change its own fleet; do so from another thread")
        with self._changing:
            yield

    def _member(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            raise InputError(f"there is no model {name!r}; there are {', '.join(self._members) or 'none'}")
        return member

    def _check_new(
        self,
        name: str,
        model: object,
        importance: float,
        deadline_seconds: float | None,
        resident_bytes: int | None,
    ) -> None:
        if self._closed:
            raise InputError("the fleet is closed; make a new one")
        if name in self._members:
            raise InputError(f"there is a model {name!r} already; give the other one another name")
        for other, member in self._members.items():
            if isinstance(model, nn.Module) and have_parts_in_common(model, member.worker.prepared.module):
                raise InputError(f"{name}: its weights' modules belong to {other!r} already; make it ones of its own")
        if not importance > 0 or not (deadline_seconds is None or deadline_seconds > 0):
            raise InputError(f"{name}: importance {importance} and deadline {deadline_seconds} must be above 0")
        if resident_bytes is not None and resident_bytes < 0:
            raise InputError(f"{name}: resident_bytes {resident_bytes} must be 0 or more; 0 keeps nothing")

    def _make_room(self, prepared: Prepared, plan: FleetPlan) -> None:
        """For measuring a model beside those that run by this plan."""
        try:
            self._shares.make_room(measuring_bytes(prepared))
        except BudgetError:  # not beside the others: they wait while it is measured
            self._turns.drain()
            for member in self._members.values():
                member.worker.pause()
            self._shares.settle(plan.limit_bytes, plan.floor_bytes, plan.heap_bytes)

    def _measure_floor(self) -> int:
        """Resident set before any weight: with the code that the models use, without what only measuring needed."""
        drop_idle_pages()
        for member in self._members.values():
            fetch_code(member.code)
        return resident_bytes()

    def _settle(self, members: Mapping[str, _Member]) -> None:
        """Let these models run, each with its part. Where not even a plan can be made, nothing has changed."""
        plan = plan_fleet(
            {name: member.candidate for name, member in members.items()},
            budget_bytes=self.budget_bytes,
            limit_bytes=memory_limit(self.budget_bytes),
            margin_bytes=MARGIN_BYTES,
            floor_bytes=self._floor_bytes + sum(member.late_bytes for member in members.values()),
            slack_bytes=SLACK_BYTES,
            policy=self._policy,
            max_active=self._max_active,
        )
        self._run(members, plan)

    def _run(self, members: Mapping[str, _Member], plan: FleetPlan) -> None:
        """Start all engines by this plan. Requests wait meanwhile, and go on whatever is raised."""
        turns, shares = self._turns, self._shares
        workers = {name: member.worker for name, member in members.items()}
        try:
            turns.drain()
            for member in self._members.values():  # all give back before any takes: no byte is promised twice
                member.worker.pause()
            shares.settle(plan.limit_bytes, plan.floor_bytes, plan.heap_bytes)
            agents = self._have_agents(plan.num_agents)
            for name, worker in workers.items():
                worker.start(plan.plans[name], shares.grant(name, plan.quotas[name]), agents)
                if name not in turns.models:
                    turns.join(name, plan.members[name].patience_seconds, worker.serve)
            self._members, self._plan = dict(members), plan
            shares.watch(workers, plan.needs, plan.round_seconds[plan.policy])
            hold_heap(plan.heap_bytes)
            drop_kernel_threads()
            self._lanes.open()
        except BaseException:
            self._plan = None  # the next request starts them
            for worker in workers.values():
                worker.pause()
            for name in turns.models - self._members.keys():
                turns.leave(name)
            raise
        finally:
            turns.resume(plan.policy, plan.max_active)

    def _have_agents(self, num_agents: int) -> LoadingAgents:
        """So many; while no engine runs."""
        if self._agents is not None and self._agents.num_agents != num_agents:
            self._agents.close()
            self._agents = None
        self._agents = self._agents or LoadingAgents(num_agents)
        return self._agents
