"""From an engine's memory on into a device's: what a model on a device pulls its blocks through.

**Threads and locks.** The Inference Agent is whoever calls `want`, `hold` and `end_pass`. One Copy Agent takes the
blocks from the engine, in the order that a second `Pipeline` foresees, and copies them into the device's window. The
condition `_ready` guards that pipeline; it is held over no read, copy or computation. The engine's lock is taken
inside it by nobody. What stops the Copy Agent stops the engine, which keeps it for whoever calls next.

**What the device does by itself.** A copy waits, on the device, for what was computed with the window's memory before
(`Device.mark`, when the Inference Agent goes on to another block). A block counts as there when its copy is done, so
that computation waits for nothing on the device.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import cast

import torch

from hermes.device.device import Device
from hermes.device.plan import DevicePlan, slot_offsets
from hermes.engine import Engine
from hermes.memory.arena import Arena
from hermes.memory.ledger import Ledger
from hermes.model.binding import BlockSource
from hermes.model.source import SourceAround
from hermes.pipeload import (
    BlockDone,
    BlockWanted,
    Compute,
    Event,
    Fetch,
    Load,
    LoadFetched,
    Pipeline,
    Place,
)

__all__ = ["STAGING_BYTES", "DeviceSource", "UnifiedSource"]

STAGING_BYTES = 32 * 2**20
"""Of the host's, through which weights that stay on the device come to it, before the first pass."""


class DeviceSource(SourceAround):
    """`BlockSource` of a model whose weights are copied to a device with memory of its own.

    Args:
        engine: brings the blocks that pass through; not yet started, and closed with this.
        device: where they go.
        plan: what stays there.
        blocks: the loads of each block.
        pinned: the engine's.
        parts: loads that bring each staying block's bytes in order, each of `STAGING_BYTES` at most if that can be.

    Attributes:
        copied_bytes: to the device, so far.

    Raises BudgetError where the plan does not fit its own budget.
    """

    def __init__(
        self,
        engine: Engine,
        device: Device,
        plan: DevicePlan,
        *,
        blocks: Sequence[Sequence[Load]],
        pinned: Sequence[Load],
        parts: Sequence[tuple[int, Iterable[tuple[int, Load]]]],
        blocks_in_pass: int | None = None,
    ) -> None:
        super().__init__(engine)
        self._engine = engine
        self.copied_bytes = 0
        self.ledger = Ledger(plan.budget_bytes, "--device-budget")
        for account, nbytes in (
            ("pinned", plan.pinned_bytes),
            ("resident", plan.staying_bytes),
            ("window", plan.ring_bytes),
            ("heap", plan.heap_bytes),
        ):
            self.ledger.reserve(account, nbytes)
        self._device = device
        self._plan = plan
        self._blocks = blocks
        self._parts = parts
        layouts = [slot_offsets([load.nbytes for load in loads]) for loads in blocks]
        self._offsets = [offsets for offsets, _ in layouts]
        self._pinned, begin = pinned, plan.pinned_bytes
        self._pinned_offsets, _ = slot_offsets([load.nbytes for load in pinned])
        self._begins: dict[int, int] = {}  # in the store, of blocks that stay
        for block in sorted(plan.stays):
            self._begins[block] = begin
            begin += layouts[block][1]
        self.ring: torch.Tensor = device.empty(plan.ring_bytes)
        self.store: torch.Tensor = device.empty(begin)
        self._host_ring, self._host_store = _bytes(engine.ring), _bytes(engine.store)
        self._pipeline = Pipeline(
            [[] if block in plan.stays else [nbytes] for block, (_, nbytes) in enumerate(layouts)],
            [frozenset() for _ in blocks],
            plan.ring_bytes,
            ahead=True,
            blocks_in_pass=blocks_in_pass,
        )
        self._ready = threading.Condition()
        self._orders: deque[Fetch] = deque()
        self._granted: Compute | None = None
        self._left: torch.Event | None = None
        self._agent = threading.Thread(target=self._run, name="hermes-copy", daemon=True)

    # ------------------------------------------------------------------ the Inference Agent's side

    def start(self) -> list[Place]:
        """Bring what stays on the device there (blocking), then begin to load the first pass."""
        self._device.synchronize()  # whoever had this memory before may not be done with it, on another stream
        self._fill_store()
        places = self._engine.start()
        offsets = self._pinned_offsets
        self._copy(
            [
                (self.store[offset : offset + load.nbytes], self._host(place, load))
                for load, place, offset in zip(self._pinned, places, offsets, strict=True)
            ]
        )
        self._agent.start()
        with self._ready:
            self._carry_out(self._pipeline.start())
        return [Place(resident=True, offset=offset) for offset in offsets]

    def want(self, block: int) -> tuple[Place, ...]:
        """Let go of what is held, and block until the weights of `block` are on the device; their places, in order.

        Of a block that does not stay. Raises what the engine's `want` raises, wherever in it.
        """
        with self._ready:
            self._engine.raise_if_stopped()
            start = self._engine.clock()
            self._leave()
            self._granted = None
            self._take_in(BlockWanted(block))
            while self._granted is None:
                self._engine.raise_if_stopped()
                self._ready.wait()
            granted: Compute = self._granted
        self._engine.count_stall(self._engine.clock() - start)
        return self._places(block, False, granted.offsets[0] or 0)

    @property
    def is_settled(self) -> bool:
        """Whether every block stays."""
        return len(self._plan.stays) == len(self._blocks)

    def hold(self, block: int) -> bool:
        """What `want` does, for a block that stays; else False."""
        if block not in self._plan.stays:
            return False
        with self._ready:
            self._engine.raise_if_stopped()
            self._release()
        return True

    def places(self, block: int) -> tuple[Place, ...]:
        """Where the loads of a block lie that stays."""
        return self._places(block, True, self._begins[block])

    def take(self, nbytes: int) -> Arena:
        """Memory of the host's, to read weights into that are then put on the device; room for them there is kept.

        Raises BudgetError where there is none, here or there.
        """
        arena = self._engine.take(nbytes)  # first: what is refused there must not stay reserved here
        self.ledger.reserve("late", self.ledger.accounts.get("late", 0) + nbytes)
        return arena

    def begin_pass(self, heap_bytes: int = 0) -> None:
        """A sweep begins that takes so many of the device's bytes besides weights. Raises BudgetError, ReadError."""
        self.ledger.reserve("heap", max(self.ledger.accounts["heap"], heap_bytes))
        self._engine.begin_pass()

    def end_pass(self) -> None:
        """The sweep is over, or was given up; waits until the device has done it, unless nothing streams.

        Raises as the engine's does.
        """
        if not self.is_settled:
            self._device.synchronize()
        with self._ready:
            self._release()
        self._engine.count_pass()

    def close(self) -> None:
        """Stop all agents, of the engine too, join those that are not calling, and drop the memory. Idempotent."""
        self._engine.close()  # whom the Copy Agent may wait for
        with self._ready:
            self._ready.notify_all()
        if self._agent.ident is not None and self._agent is not threading.current_thread():
            self._agent.join()
        self._device.synchronize()
        self._host_ring = self._host_store = self.ring = self.store = torch.empty(0, dtype=torch.uint8)

    def _release(self) -> None:
        if self._pipeline.is_held:
            self._leave()
            self._take_in(BlockDone())

    def _leave(self) -> None:
        if self._pipeline.is_held:
            self._left = self._device.mark()  # before the memory is given out again

    def _places(self, block: int, resident: bool, begin: int) -> tuple[Place, ...]:
        return tuple(Place(resident=resident, offset=begin + offset) for offset in self._offsets[block])

    def _fill_store(self) -> None:
        """In batches, each read by all Loading Agents at once."""
        batch: list[tuple[Load, int, int]] = []  # load, where it goes in the staging memory, and in the store
        used, staging = 0, Arena(0)
        for block, parts in self._parts:
            for offset, load in parts:
                if batch and used + load.slot_bytes > STAGING_BYTES:
                    staging, used = self._bring(batch, used, staging), 0
                    batch.clear()
                batch.append((load, used, self._begins[block] + offset))
                used += load.slot_bytes
        if batch:
            self._bring(batch, used, staging)

    def _bring(self, batch: Sequence[tuple[Load, int, int]], nbytes: int, staging: Arena) -> Arena:
        if staging.nbytes < nbytes:
            staging.close()
            staging = Arena(nbytes)
        self._engine.fetch([(load, staging.view[slot : slot + load.slot_bytes]) for load, slot, _ in batch])
        host = _bytes(staging)
        self._copy(
            [
                (
                    self.store[target : target + load.nbytes],
                    host[slot + load.data_offset : slot + load.data_offset + load.nbytes],
                )
                for load, slot, target in batch
            ]
        )
        return staging

    def _host(self, place: Place, load: Load) -> torch.Tensor:
        memory = self._host_store if place.resident else self._host_ring
        return memory[place.offset : place.offset + load.nbytes]

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: torch.Event | None = None) -> None:
        self._device.copy_in(pairs, after)
        self.copied_bytes += sum(source.nbytes for _, source in pairs)

    # ------------------------------------------------------------------ the Copy Agent's side

    def _take_in(self, event: Event) -> None:
        self._carry_out(self._pipeline.on(event))

    def _carry_out(self, orders: Sequence[object]) -> None:
        for order in orders:
            match order:
                case Fetch():
                    self._orders.append(order)
                case Compute():
                    self._granted = order
        if orders:
            self._ready.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._ready:
                    while not self._orders:
                        if self._engine.is_stopped:
                            return
                        self._ready.wait()
                    order, left = self._orders.popleft(), self._left
                    is_abandoned = self._pipeline.is_abandoned(order.visit)
                if not is_abandoned:
                    self._bring_block(order, left)
                with self._ready:
                    self._take_in(LoadFetched(order.visit))
        except BaseException as error:
            self._engine.fail(error)
            with self._ready:
                self._ready.notify_all()

    def _bring_block(self, order: Fetch, left: torch.Event | None) -> None:
        block, begin = order.block, order.offset or 0
        there = threading.Event()
        self._engine.ask(block, there.set)  # `want` alone would count its waiting as inference's
        there.wait()
        places = self._engine.want(block)
        self._copy(
            [
                (self.ring[begin + offset : begin + offset + load.nbytes], self._host(place, load))
                for load, place, offset in zip(self._blocks[block], places, self._offsets[block], strict=True)
            ],
            left,
        )
        self._engine.release()


class UnifiedSource(SourceAround):
    """`BlockSource` of a model on a device that shares the host's memory: another one, seen from there.

    The device computes behind the Inference Agent's back: before what streams is let go of, it must be done with it.
    """

    def __init__(self, source: BlockSource, device: Device) -> None:
        super().__init__(source)
        self._device = device
        self.ring = device.view(cast(Arena, source.ring))
        self.store = device.view(cast(Arena, source.store))
        self._streams = False  # what is held

    def want(self, block: int) -> tuple[Place, ...]:
        """As the other's, once the device is done with what was held."""
        self._leave()
        self._streams = True
        return self._source.want(block)

    def hold(self, block: int) -> bool:
        """Likewise."""
        self._leave()
        return self._source.hold(block)

    def end_pass(self) -> None:
        """Likewise, once the device has done it."""
        self._streams = False
        self._device.synchronize()
        self._source.end_pass()

    def close(self) -> None:
        """Wait for the device, and close the engine. Idempotent."""
        self._device.synchronize()
        self.ring = self.store = torch.empty(0, dtype=torch.uint8)
        self._source.close()

    def _leave(self) -> None:
        if self._streams:
            self._device.synchronize()
            self._streams = False


def _bytes(arena: Arena) -> torch.Tensor:
    return torch.frombuffer(arena.view, dtype=torch.uint8)
