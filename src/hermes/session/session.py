"""A model with its engine: started from a plan, closed once, reporting what it did."""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn

from hermes.checkpoint.readers import Reader
from hermes.engine import Engine, EngineConfig, EngineStats, LoadingAgents
from hermes.errors import InputError
from hermes.memory.allocator import grow_heap, hold_heap
from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.memory.probe import find_cgroup
from hermes.model.binding import Binding, BlockSource
from hermes.model.kernels import settle_functions
from hermes.model.mapping import is_plain_linear
from hermes.model.product import try_order
from hermes.model.skeleton import move_values
from hermes.model.units import Granularity
from hermes.plan import Plan
from hermes.session.demand import demand_of
from hermes.session.prepared import Prepared
from hermes.session.target import Target, shared_target

__all__ = ["MARGIN_BYTES", "Session", "attach", "memory_limit", "start_session"]

MARGIN_BYTES = 24 * 2**20
"""Part of every budget that is never planned with: what the kernel holds for the process (page tables, stacks, inodes:
14 MiB seen), counted by cgroups alone, and some pages of the cache, without which it evicts code that is in use."""

GROWN_BYTES = 15 * 2**20
"""Of heap, before the first pass: below what the allocator gives back at once."""


def memory_limit(budget_bytes: int) -> int:
    """The budget, or the limit of the cgroup this process is in (`Cgroup.limit_bytes`), if that is tighter."""
    cgroup = find_cgroup()
    if cgroup is None or cgroup.limit_bytes is None:
        return budget_bytes
    return min(budget_bytes, cgroup.limit_bytes)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What `model.hermes` is: the plan, the engine's statistics, and the way to end it.

    Attributes:
        prepared: skeleton, sources and partition.
        plan: what was settled.
        stats: what was measured so far.
        ledger: reservations under the budget.
        engine: what moves the weights.
        target: the device that the model computes on; None on the CPU.
        source: what the model pulls its blocks through.
    """

    prepared: Prepared
    plan: Plan
    stats: EngineStats
    ledger: Ledger
    engine: Engine
    source: BlockSource
    target: Target | None = None
    _close: Callable[[], None]

    def close(self) -> None:
        """Stop the agents, free the memory, close the files; the model cannot run any more. Idempotent.

        Does nothing in a process that was forked from the session's: the agents, whom it would wait for, are not there.
        """
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_session(
    prepared: Prepared,
    plan: Plan,
    reader: Reader,
    *,
    record: bool = False,
    quota: Ledger | None = None,
    source: Callable[[Engine], BlockSource] = lambda engine: engine,
    agents: LoadingAgents | None = None,
    urgency: Callable[[], float] = lambda: 0.0,
    target: Target | None = None,
) -> Session:
    """Take the memory (first what was found for it), start the agents, bind the model.

    The reader is closed with the session, or at once where it cannot be started.

    With a `quota` the session is one of several in a budget: weights, window and buffers are reserved there, and floor
    and heap are the business of whoever gave it, who also watches real memory. `source` is what the model pulls its
    blocks through: the engine itself, or something around it that decides whose turn it is. `agents` read for several
    sessions, the one with the lowest number of `urgency` first; without them the session has its own. `target` is the
    device that the model was prepared for; one that shares the host's memory needs none to be given.

    Raises:
        BudgetError: the plan does not fit its own limit any more.
        ReadError: the pinned weights could not be read.
    """
    with contextlib.ExitStack() as undo:  # what has begun, where the rest fails
        undo.callback(reader.close)
        target = target or shared_target(prepared.device)
        if target is None:
            settle_functions()
        else:
            move_values(prepared.module, target.device.device)
        is_apart = target is not None and target.plan is not None
        warmed, prepared = prepared.warmed, replace(prepared, warmed=None)
        factory = prepared.factory(reader.alignment, plan.piece_bytes)
        blocks, block_of_unit = prepared.blocks(factory, cast(Granularity, plan.granularity))
        pinned = factory.pinned(prepared.partition.pinned)
        bounced = any(piece.bounced for block in [*blocks, pinned] for load in block.loads for piece in load.pieces)
        ledger = quota or Ledger(plan.limit_bytes)
        if quota is None:
            hold_heap(plan.heap_bytes)
            ledger.reserve("floor", plan.floor_bytes)
            ledger.reserve("heap", plan.heap_bytes)
            ledger.reserve("margin", min(MARGIN_BYTES, ledger.free_bytes))
        blocks_in_pass = prepared.blocks_in_pass(block_of_unit)
        take_memory: Callable[[int], Arena] = Arena if warmed is None else warmed.take
        engine = Engine(
            [block.loads for block in blocks] if target is None else target.loads_of(blocks),
            pinned=pinned.loads,
            reader=reader,
            ledger=ledger,
            config=EngineConfig(
                ring_bytes=plan.ring_bytes,
                resident=plan.resident,
                packed=plan.packed,
                num_agents=plan.num_agents,
                buffer_bytes=factory.buffer_bytes if bounced else 0,
                ahead=not plan.sequential,
                blocks_in_pass=blocks_in_pass,
                limit_bytes=plan.limit_bytes - MARGIN_BYTES // 2 if quota is None else None,
                elastic=quota is not None and target is None,
                gives_back=target is None or is_apart,
                record=record,
            ),
            take_memory=take_memory if target is None else target.device.host_memory,
            agents=agents,
            urgency=urgency,
        )
        if warmed is not None:
            warmed.close()
        undo.callback(engine.close)
        pulled = source(engine)
        if target is not None:
            pulled = target.source(
                engine, pulled, blocks=blocks, pinned=pinned, factory=factory, blocks_in_pass=blocks_in_pass
            )
            undo.callback(pulled.close)
        linears = _linears(prepared)  # before they are bound
        binding = Binding(
            prepared.module,
            pulled,
            blocks=blocks,
            pinned=pinned,
            partition=prepared.partition,
            block_of_unit=block_of_unit,
            factory=factory,
            demand=demand_of(prepared, prepared.device_activation_bytes if is_apart else plan.heap_bytes),
            device=prepared.device,
        )
        detach = weakref.WeakMethod(binding.detach)
        process = os.getpid()
        # What stands before an engine in a fleet leads to the fleet, and to this module: the engine alone, there.
        ending = pulled.close if is_apart else engine.close
        collected = weakref.finalize(prepared.module, _close_collected, process, ending)

        def close() -> None:
            if os.getpid() != process:
                return
            pulled.close()
            collected.detach()  # which would keep the engine for as long as the module
            if (method := detach()) is not None:
                method()

        undo.callback(close)
        binding.start()
        if quota is None and target is None:
            _get_ready(prepared, plan, linears)
        undo.pop_all()
        return Session(
            prepared=prepared,
            plan=plan,
            stats=engine.stats,
            ledger=ledger,
            engine=engine,
            target=target,
            source=pulled,
            _close=close,
        )


def _linears(prepared: Prepared) -> list[tuple[nn.Linear, int]]:
    """Linear layers that the traced pass multiplies with, and how many tokens."""
    if (trace := prepared.trace) is None:
        return []
    return [
        (module, tokens)
        for name, module in prepared.module.named_modules()
        if is_plain_linear(module) and (tokens := trace.tokens(name, module.weight.numel()))
    ]


def _get_ready(prepared: Prepared, plan: Plan, linears: Sequence[tuple[nn.Linear, int]]) -> None:
    """What the first pass would have to do, done while the disk fills the window."""
    if prepared.trace is None:
        return
    grow_heap(min(prepared.trace.peak_bytes, plan.heap_bytes, GROWN_BYTES))
    for module, tokens in linears:
        try_order(module, tokens)


def _close_collected(process: int, close: Callable[[], None]) -> None:
    """Close the session of a module that the garbage collector has found, in whichever thread, holding what locks."""
    if os.getpid() != process:
        return
    if not threading.current_thread().name.startswith("hermes-"):
        close()
        return
    # An agent would wait here for others that wait for a lock it holds.
    with contextlib.suppress(RuntimeError):  # no thread begins while the interpreter ends, and all agents end then
        threading.Thread(target=close, name="hermes-closer", daemon=True).start()


def attach(module: nn.Module, session: Session) -> nn.Module:
    """Make `module` carry its session as `module.hermes`, close with a `with` block, and refuse what it cannot do.

    That is to be cast, moved, copied or saved: its weights are where they came from.
    """

    def enter(self: Any) -> Any:
        return self

    def leave(
        self: Any, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hermes.close()

    def apply(self: Any, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for tensor in (*self.parameters(), *self.buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            changed = function(probe)
            if (changed.dtype, changed.device) != (probe.dtype, probe.device):
                raise InputError(
                    f"the weights of a streamed model stay {probe.dtype} on {probe.device}; load it again, with dtype= "
                    "or device="
                )
        return self

    source = session.prepared.source

    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise InputError(f"a streamed model holds no weights to copy or save; they are in {source}")

    cls = type(module)
    namespace: dict[str, Any] = {
        "__enter__": enter, "__exit__": leave, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "_apply": apply, "__deepcopy__": refuse, "__reduce_ex__": refuse,
    }  # fmt: skip
    if hasattr(cls, "save_pretrained"):
        namespace["save_pretrained"] = refuse
    module.__class__ = type(cls.__name__, (cls,), namespace)
    object.__setattr__(module, "hermes", session)
    return module
