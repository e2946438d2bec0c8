"""A device for a session: which weights stay there, what the planner is asked about the rest, and who brings them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hermes.device import Device, DevicePlan, DeviceSource, UnifiedSource, measure_rates, plan_device
from hermes.device.plan import slot_offsets
from hermes.device.source import STAGING_BYTES
from hermes.engine import Engine
from hermes.errors import InputError
from hermes.model.binding import HOST, BlockSource
from hermes.model.blocks import Block, LoadFactory
from hermes.model.units import Granularity
from hermes.pipeload import Load
from hermes.plan import Problem, UnitCost
from hermes.profile import Calibration
from hermes.session.prepared import Prepared

__all__ = ["GRANULARITY", "Target", "aim_at", "shared_target"]

GRANULARITY: Granularity = "half"
"""Of a device with memory of its own: few copies, and a window that is no larger than it needs to be."""
FREE_SHARE = 0.9
"""Of the device's free memory, where no budget was given: what torch rounds up is not planned with."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device other than the CPU.

    Attributes:
        device: the device.
        plan: None where it shares the host's memory.
        granularity: that `plan` was made for.
        copy_bytes_per_second: to it.
        staging_bytes: of the host's, through which what stays comes to it.
    """

    device: Device
    plan: DevicePlan | None = None
    granularity: Granularity = GRANULARITY
    copy_bytes_per_second: float = math.inf
    staging_bytes: int = 0

    def document(self) -> dict[str, Any]:
        """For reports."""
        plan = self.plan
        return {
            "name": str(self.device.device),
            "peak_bytes": self.device.peak_bytes,
            "budget_bytes": None if plan is None else plan.budget_bytes,
            "staying_bytes": 0 if plan is None else plan.staying_bytes,
            "ring_bytes": 0 if plan is None else plan.ring_bytes,
            "pass_bytes": 0 if plan is None else plan.pass_bytes,
        }

    @property
    def stays(self) -> frozenset[int]:
        """Blocks that the engine never brings: they are on the device."""
        return frozenset() if self.plan is None else self.plan.stays

    def rest_of(self, problem: Problem) -> Problem:
        """What the engine has to do: blocks that stay on the device cost no bytes, and copying the others takes time.

        Copies go on beside computation, so the longer one of both counts. All of it, where memory is shared.
        """
        if self.plan is None:
            return problem
        groups = problem.groups[self.granularity]
        units = list(problem.units)
        for number, block in enumerate(groups):
            for unit in block:
                units[unit] = self._without_bytes(units[unit]) if number in self.stays else self._copied(units[unit])
        return replace(
            problem,
            units=units,
            groups={self.granularity: groups},
            heap_bytes=problem.heap_bytes + self.staging_bytes,
        )

    def loads_of(self, blocks: Sequence[Block]) -> list[tuple[Load, ...]]:
        """What the engine streams."""
        return [() if number in self.stays else block.loads for number, block in enumerate(blocks)]

    def source(
        self,
        engine: Engine,
        source: BlockSource,
        *,
        blocks: Sequence[Block],
        pinned: Block,
        factory: LoadFactory,
        blocks_in_pass: int | None,
    ) -> BlockSource:
        """What the model pulls its blocks through: `source` as such a device needs it, or what copies them there.

        Raises BudgetError.
        """
        if self.plan is None:
            return UnifiedSource(source, self.device)
        return DeviceSource(
            engine,
            self.device,
            self.plan,
            blocks=[block.loads for block in blocks],
            pinned=pinned.loads,
            parts=[(block, list(_parts(blocks[block].loads, factory))) for block in sorted(self.stays)],
            blocks_in_pass=blocks_in_pass,
        )

    def _without_bytes(self, unit: UnitCost) -> UnitCost:
        return replace(unit, slot_bytes=(), read_bytes=(), unpack_seconds=())

    def _copied(self, unit: UnitCost) -> UnitCost:
        seconds = sum(unit.slot_bytes) / self.copy_bytes_per_second
        return replace(
            unit,
            first_seconds=max(unit.first_seconds, seconds),
            next_seconds=max(unit.next_seconds, seconds),
        )


def shared_target(device: torch.device) -> Target | None:
    """Of a device that shares the host's memory; None for the CPU. Raises InputError where it has its own."""
    if device == HOST:
        return None
    found = Device(str(device))
    if not found.is_unified:
        raise InputError(
            f"device {device} has memory of its own; a fleet is for the CPU, or for a device that shares its memory; "
            "use hermes.load there"
        )
    return Target(device=found)


def aim_at(
    device: Device,
    prepared: Prepared,
    factory: LoadFactory,
    *,
    budget_bytes: int | None,
    granularity: Granularity | None,
) -> tuple[Target, Calibration]:
    """Measure the device, and settle what stays there; how fast it computes. Raises BudgetError; reads nothing."""
    workload = prepared.workload
    rates = measure_rates(device, getattr(torch, prepared.dtype), workload.batch_size * workload.sequence_length)
    settled: Granularity = granularity or GRANULARITY
    plan, staging_bytes = None, 0
    if not device.is_unified:
        blocks, block_of_unit = prepared.blocks(factory, settled)
        plan = plan_device(
            [_device_bytes(block.loads) for block in blocks],
            num_in_pass=prepared.blocks_in_pass(block_of_unit) or len(blocks),
            pinned_bytes=_device_bytes(factory.pinned(prepared.partition.pinned).loads),
            heap_bytes=prepared.device_heap_bytes,
            budget_bytes=budget_bytes or int(FREE_SHARE * device.free_bytes),
        )
        parts = [part.slot_bytes for block in plan.stays for _, part in _parts(blocks[block].loads, factory)]
        staging_bytes = min(sum(parts), max(STAGING_BYTES, *parts)) if parts else 0
    target = Target(
        device=device,
        plan=plan,
        granularity=settled,
        copy_bytes_per_second=rates.copy_bytes_per_second,
        staging_bytes=staging_bytes,
    )
    return target, rates.compute


def _device_bytes(loads: Iterable[Load]) -> int:
    return slot_offsets([load.nbytes for load in loads])[1]


def _parts(loads: Sequence[Load], factory: LoadFactory) -> Iterator[tuple[int, Load]]:
    """Where on the device, from the block's begin on, and what to read there."""
    offsets, _ = slot_offsets([load.nbytes for load in loads])
    for load, offset in zip(loads, offsets, strict=True):
        for part in factory.parts(load, STAGING_BYTES):
            yield offset, part
            offset += part.nbytes
