"""Several models under one budget (SwapNet): `Fleet` prepares them, divides the bytes, and runs their requests."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from torch import nn

from hermes.device import find_device
from hermes.engine import LoadingAgents
from hermes.errors import BudgetError, InputError
from hermes.fleet.lanes import Lanes, drop_kernel_threads
from hermes.fleet.measuring import SCRATCH_SLOTS, SLACK_BYTES, factory_of, measure_candidate
from hermes.fleet.members import Candidate
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
from hermes.model.blocks import Block
from hermes.model.inputs import example_inputs, moved
from hermes.session import (
    MARGIN_BYTES,
    UNTRACED_HEAP_BYTES,
    Prepared,
    Workload,
    memory_limit,
    prepare_model,
    prepare_module,
    shared_target,
)
from hermes.units import parse_bytes

__all__ = ["Fleet", "FleetReport", "ModelReport"]

MATRIX_BYTES = 16 * 2**20
"""Larger matrices are computed by ranges of rows, or no quota below twice their size would do."""
SKELETON_BYTES_PER_MODULE = 16 * 2**10


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
        self._elastic = elastic and self.device == HOST
        self._candidates: dict[str, Candidate] = {}
        self._prepared: dict[str, Prepared] = {}
        self._workers: dict[str, Worker] = {}
        self._plan: FleetPlan | None = None
        self._turns: Turns | None = None
        self._agents: LoadingAgents | None = None
        self._shares: Shares | None = None
        self._lanes = Lanes()
        self._floor_bytes = 0
        self._codes: dict[str, Code] = {}  # of libraries, what each model's passes use
        self._changing = threading.RLock()  # one add, remove or start at a time
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
            InputError: a name taken twice, an importance that is not positive, negative `resident_bytes`.
            BudgetError: not even the smallest windows fit; the fleet stays as it was.
            CheckpointError, ModelError, ReadError: as they say; likewise.
        """
        with self._changing:
            self._check_new(name, importance, deadline_seconds, resident_bytes)
            if isinstance(model, nn.Module):
                if checkpoint is None or not (example_args or example_kwargs):
                    raise InputError(f"{name}: a module needs its checkpoint and example_args, to be measured with")
                prepared = prepare_module(
                    model.eval(),
                    checkpoint,
                    args=example_args,
                    kwargs=example_kwargs,
                    matrix_bytes=matrix_bytes,
                    device=self.device,
                )
                kwargs = dict(example_kwargs or {})
            else:
                workload = Workload(
                    batch_size=batch_size, sequence_length=sequence_length, max_new_tokens=max_new_tokens
                )
                prepared = prepare_model(model, workload=workload, matrix_bytes=matrix_bytes, device=self.device)
                kwargs = example_inputs(prepared.module, batch_size=batch_size, sequence_length=sequence_length) or {}
            was = self._candidates
            try:
                if self._shares is not None:
                    self._make_room(prepared)
                call = _forward(*moved((example_args, kwargs), self.device))
                self._candidates = {
                    **was,
                    name: measure_candidate(
                        prepared,
                        call,
                        limit_bytes=self.budget_bytes,
                        alone=not self._workers,
                        importance=importance,
                        deadline_seconds=deadline_seconds,
                        resident_bytes=resident_bytes,
                    ),
                }
                self._prepared[name] = prepared
                self._codes[name] = code_in_use() if prepared.known is None else prepared.known.code
                if self._workers:
                    self._floor_bytes += SKELETON_BYTES_PER_MODULE * sum(1 for _ in prepared.module.modules())
                    self._settle()
            except BaseException:
                self._candidates = was
                self._prepared.pop(name, None)
                self._codes.pop(name, None)
                if self._workers:
                    self._settle()
                raise

    def remove(self, name: str) -> None:
        """Let a model go once its requests are answered; its bytes go to the others. Raises InputError."""
        with self._changing:
            if name not in self._candidates:
                raise InputError(f"there is no model {name!r}; there are {', '.join(self._candidates) or 'none'}")
            gone = self._workers.pop(name, None)
            if gone is not None:
                turns, shares = self._running()
                turns.leave(name)
                gone.pause()
                shares.let_go(name)
            del self._candidates[name], self._prepared[name], self._codes[name]
            if self._workers:
                self._settle()

    def start(self) -> FleetPlan:
        """Divide the bytes and start the engines; `submit` does it where nobody has. Returns the plan.

        Raises BudgetError, with the smallest budget that works. Blocking until small weights are read.
        """
        with self._changing:
            if self._closed:
                raise InputError("the fleet is closed; make a new one")
            if self._plan is None:
                if not self._candidates:
                    raise InputError("the fleet has no models; add some first")
                self._floor_bytes = self._measure_floor()
                self._settle()
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

        It runs on the one thread that computes for all models: it must not wait for another request of this fleet.
        """
        if self._plan is None or self._closed:
            self.start()
        worker = self._workers.get(name)
        if worker is None:
            raise InputError(f"there is no model {name!r}; there are {', '.join(self._workers)}")
        own = self._candidates[name].deadline_seconds
        return worker.submit(function, own if deadline_seconds is None else deadline_seconds)

    @property
    def plan(self) -> FleetPlan:
        """What is settled. Raises InputError before `start`."""
        if self._plan is None:
            raise InputError("the fleet has not started; call start() first")
        return self._plan

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """The models as the planner sees them: costs and activations, as measured."""
        return dict(self._candidates)

    @property
    def quotas(self) -> Mapping[str, int]:
        """Bytes for weights that each model has now, what was lent included."""
        return {} if self._shares is None else self._shares.quotas

    def report(self) -> FleetReport:
        """What was measured so far, beside what was predicted for as many requests of each model."""
        return make_report(self.plan, self._workers, peak_resident_bytes())

    def close(self) -> None:
        """End all: requests under way are answered, those that wait are cancelled. Idempotent."""
        with self._changing:
            self._closed = True
            if self._shares is not None:
                self._shares.close()
            waiting = [] if self._turns is None else self._turns.close()
            self._lanes.close()
            for worker in self._workers.values():
                worker.pause()
            if self._agents is not None:
                self._agents.close()
            for request in waiting:
                request.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ how

    def _check_new(
        self, name: str, importance: float, deadline_seconds: float | None, resident_bytes: int | None
    ) -> None:
        if self._closed:
            raise InputError("the fleet is closed; make a new one")
        if name in self._candidates:
            raise InputError(f"there is a model {name!r} already; give the other one another name")
        if not importance > 0 or not (deadline_seconds is None or deadline_seconds > 0):
            raise InputError(f"{name}: importance {importance} and deadline {deadline_seconds} must be above 0")
        if resident_bytes is not None and resident_bytes < 0:
            raise InputError(f"{name}: resident_bytes {resident_bytes} must be 0 or more; 0 keeps nothing")

    def _running(self) -> tuple[Turns, Shares]:
        if self._turns is None or self._shares is None:
            raise InputError("the fleet has not started; call start() first")
        return self._turns, self._shares

    def _make_room(self, prepared: Prepared) -> None:
        """For measuring a model beside those that run: its smallest window twice, what is pinned, and computing."""
        slots = [sum(load.slot_bytes for load in block.loads) for block in _leaves(prepared)]
        pinned = sum(load.slot_bytes for load in factory_of(prepared).pinned(prepared.partition.pinned).loads)
        activations = prepared.trace.peak_bytes if prepared.trace is not None else UNTRACED_HEAP_BYTES
        turns, shares = self._running()
        try:
            shares.make_room((4 + SCRATCH_SLOTS) * max(slots, default=0) + pinned + activations)
        except BudgetError:  # not beside the others: they wait while it is measured
            turns.drain()
            for worker in self._workers.values():
                worker.pause()
            shares.settle(self.plan.floor_bytes, self.plan.heap_bytes)

    def _measure_floor(self) -> int:
        """Resident set before any weight: with the code that the models use, without what only measuring needed."""
        drop_idle_pages()
        for code in self._codes.values():
            fetch_code(code)
        return resident_bytes()

    def _settle(self) -> None:
        """Plan for the models there are, and let each run with its part. Requests wait meanwhile."""
        limit_bytes = memory_limit(self.budget_bytes)
        plan = plan_fleet(
            self._candidates,
            budget_bytes=self.budget_bytes,
            limit_bytes=limit_bytes,
            margin_bytes=MARGIN_BYTES,
            floor_bytes=self._floor_bytes,
            slack_bytes=SLACK_BYTES,
            policy=self._policy,
            max_active=self._max_active,
        )
        if self._turns is None:
            self._turns = Turns(plan.policy, max_active=plan.max_active, lanes=self._lanes)
            self._shares = Shares(limit_bytes, MARGIN_BYTES, self._turns, elastic=self._elastic)
        turns, shares = self._running()
        turns.drain()
        shares.settle(plan.floor_bytes, plan.heap_bytes)
        for worker in self._workers.values():  # all give back before any takes: no byte is promised twice
            worker.pause()
        agents = self._have_agents(plan.num_agents)
        for name in plan.plans:
            quota = shares.grant(name, plan.quotas[name])
            if name not in self._workers:
                self._workers[name] = Worker(name, self._prepared[name], turns)
                turns.join(name, plan.members[name].patience_seconds, self._workers[name].serve)
            self._workers[name].start(plan.plans[name], quota, agents)
        self._plan = plan
        shares.watch(self._workers, plan.needs, plan.round_seconds[plan.policy])
        hold_heap(plan.heap_bytes)
        drop_kernel_threads()
        self._lanes.open()
        turns.resume(plan.policy, plan.max_active)

    def _have_agents(self, num_agents: int) -> LoadingAgents:
        """So many; while no engine runs."""
        if self._agents is not None and self._agents.num_agents != num_agents:
            self._agents.close()
            self._agents = None
        self._agents = self._agents or LoadingAgents(num_agents)
        return self._agents


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], object]:
    return lambda module: module(*args, **kwargs)


def _leaves(prepared: Prepared) -> list[Block]:
    return prepared.blocks(factory_of(prepared), "leaf")[0]
