"""A model as it is known before a weight is read, and the planner's view of it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hermes.checkpoint import Checkpoint, Reader, open_reader
from hermes.memory.arena import Arena
from hermes.memory.warm import Warmed
from hermes.model.binding import HOST
from hermes.model.blocks import Block, LoadFactory, torch_dtype
from hermes.model.inputs import vocabulary_size
from hermes.model.mapping import WeightMap, is_plain_linear, is_transformers_model
from hermes.model.product import can_stay_packed
from hermes.model.rows import KEPT_BYTES, READ_BYTES
from hermes.model.trace import Trace
from hermes.model.units import GRANULARITIES, Granularity, Partition, Unit, group_units
from hermes.plan import Bandwidth, Problem, UnitCost
from hermes.profile import BlockSample, Profile
from hermes.session.ranges import knows_ranges, matrix_bytes_of, unpacked_bytes
from hermes.session.workload import HEAP_SLACK_BYTES, Workload, heap_bytes

__all__ = ["Prepared", "dtype_name", "weight_bytes"]

PACKED_HEAP_BYTES = 16 * 2**20
"""Tables of chunks, pieces that know how to unpack them, and rows that are unpacked for a product."""
QUANTIZED_HEAP_BYTES = 16 * 2**20
"""Rows of a quantised matrix that are made floats for a product, and what they pass through."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A skeleton and all that is known about it; weights are still on disk."""

    module: nn.Module
    checkpoint: Checkpoint
    weights: WeightMap
    trace: Trace | None
    partition: Partition
    workload: Workload
    source: Path
    known: Profile | None = None
    """What was measured of it before."""
    preparing_bytes: int = 0
    """That this process and the child that traced the model had between them; 0 if nothing was traced apart."""
    warmed: Warmed | None = None
    """Memory that was found meanwhile, where a limit was given; not a part of the floor."""
    device: torch.device = HOST
    """That it is going to compute on."""

    def lend(self, nbytes: int) -> Arena:
        """Memory for a moment: what was found for the weights, before they are there."""
        return Arena(nbytes) if self.warmed is None else self.warmed.lend(nbytes)

    @property
    def weight_bytes(self) -> int:
        """`weight_bytes` of the model."""
        return weight_bytes(self.module, self.weights)

    @property
    def heap_bytes(self) -> int:
        """What the workload takes of the host's memory besides weights."""
        if self.device != HOST:
            return HEAP_SLACK_BYTES + self._row_bytes + (PACKED_HEAP_BYTES if self.checkpoint.packed else 0)
        nbytes = heap_bytes(
            self.workload,
            self.trace,
            vocabulary_size=vocabulary_size(self.module),
            row_bytes=self._row_bytes,
        )
        nbytes += PACKED_HEAP_BYTES if self.checkpoint.packed else 0
        prompt_tokens = self.workload.batch_size * self.workload.sequence_length
        nbytes += max(self.gathered_bytes(tokens) for tokens in (prompt_tokens, self.workload.batch_size))
        return nbytes + (QUANTIZED_HEAP_BYTES if self.checkpoint.quantized else 0)

    @property
    def device_heap_bytes(self) -> int:
        """What the workload takes of a device's own memory besides weights.

        The slack is for its libraries' buffers, and for passes that are a little larger than was planned.
        """
        return self.device_activation_bytes + HEAP_SLACK_BYTES

    @property
    def device_activation_bytes(self) -> int:
        """The same without slack."""
        vocabulary = vocabulary_size(self.module)
        return heap_bytes(self.workload, self.trace, vocabulary_size=vocabulary, row_bytes=0) - HEAP_SLACK_BYTES

    @cached_property
    def gathered_bytes(self) -> Callable[[int], int]:
        """By the number of tokens of a pass: bytes of the largest matrix that they need whole, but comes otherwise."""
        return functools.cache(self._gathered_bytes)

    def _gathered_bytes(self, tokens: int) -> int:
        return max((self._unit_gathered_bytes(unit, tokens) for unit in self.partition.units if tokens), default=0)

    def _unit_gathered_bytes(self, unit: Unit, tokens: int) -> int:
        layer = self.module.get_submodule(unit.module)
        begin, end = unit.rows or (0, 0)
        if unit.module in self.partition.gathered and begin == 0 and not knows_ranges(layer, tokens, end):
            return matrix_bytes_of(layer)
        return unpacked_bytes(layer, tokens, unit.rows) if unit.parameters[0] in self._stay_packed else 0

    @property
    def _row_bytes(self) -> int:
        tables = [cast(nn.Embedding, self.module.get_submodule(name)).weight for name in self.partition.rowwise]
        kept = sum(min(table.numel() * table.element_size(), KEPT_BYTES) for table in tables)
        return READ_BYTES + kept if tables else 0

    @property
    def model_class(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__

    @property
    def dtype(self) -> str:
        """`dtype_name` of the model."""
        return dtype_name(self.module)

    def sample(self, unit: Unit) -> BlockSample:
        """A unit as the delay model sees it; without a trace, its bytes alone."""
        nbytes = sum(self._nbytes(name, unit.rows) for name in unit.parameters)
        trace = self.trace
        return BlockSample(
            nbytes=nbytes,
            flops=_unit_flops(trace, self.partition, unit) if trace is not None else 0,
            activation_bytes=trace.live_bytes.get(unit.module, 0) if trace is not None else 0,
            depth=1,
        )

    def _nbytes(self, name: str, rows: tuple[int, int] | None) -> int:
        if self.weights.sources[name].quantized:
            return self.weights.sources[name].nbytes
        tensor = self.module.get_parameter(name)
        count = tensor.numel() if rows is None else tensor.numel() // tensor.shape[0] * (rows[1] - rows[0])
        return count * tensor.element_size()

    def reader(self) -> Reader:
        """A new reader over the checkpoint's files."""
        return open_reader(self.checkpoint)

    def factory(self, alignment: int, piece_bytes: int) -> LoadFactory:
        """Makes the loads, for one reader's alignment and one piece size."""
        return LoadFactory(
            self.module,
            self.weights.sources,
            alignment=alignment,
            piece_bytes=piece_bytes,
            # Of a transformers model on the CPU, as in its file; a device's kernels choose by alignment.
            cache_lines=self.device != HOST or not is_transformers_model(self.module),
            packed=self.checkpoint.packed,
            stay_packed=self._stay_packed,
            device=self.device,
        )

    @cached_property
    def _stay_packed(self) -> frozenset[str]:
        """Matrices that stay packed in memory: those of linear layers in a model that generates, a token at a time."""
        if not self.checkpoint.packed or not self.workload.max_new_tokens or self.device != HOST:
            return frozenset()
        units = [unit for unit in self.partition.units if len(unit.parameters) == 1]
        return frozenset(unit.parameters[0] for unit in units if self._can_stay_packed(unit))

    def _can_stay_packed(self, unit: Unit) -> bool:
        module, source = self.module.get_submodule(unit.module), self.weights.sources[unit.parameters[0]]
        return (
            is_plain_linear(module)
            and module.weight is self.module.get_parameter(unit.parameters[0])
            and source.convert is None
            and len(source.extents) == 1
            and source.extents[0].file in self.checkpoint.packed
            and torch_dtype(source.dtype) == module.weight.dtype
            and can_stay_packed(module.weight.dtype, module.weight.shape)
        )

    def blocks(self, factory: LoadFactory, granularity: Granularity) -> tuple[list[Block], list[int]]:
        """Blocks at a granularity, and the number of the block that each unit is in."""
        groups = self._groups(granularity)
        block_of_unit = [0] * len(self.partition.units)
        for number, units in enumerate(groups):
            for unit in units:
                block_of_unit[unit] = number
        return [factory.block(self.partition.units[unit] for unit in units) for units in groups], block_of_unit

    def blocks_in_pass(self, block_of_unit: Sequence[int]) -> int | None:
        """How many of those blocks a pass visits; None where nobody knows."""
        num_in_pass = self.partition.num_in_pass
        return block_of_unit[num_in_pass - 1] + 1 if num_in_pass else None

    def _groups(self, granularity: Granularity) -> list[list[int]]:
        return group_units(self.partition, granularity, self._unit_bytes)

    @cached_property
    def _unit_bytes(self) -> list[int]:
        return [self.sample(unit).nbytes for unit in self.partition.units]

    def problem(self, profile: Profile, factory: LoadFactory, *, floor_bytes: int) -> Problem:
        """The planner's view of this model with the costs of `profile`."""
        workload = self.workload
        prompt_tokens = workload.batch_size * workload.sequence_length
        rate = profile.unpack_bytes_per_second
        head = cast(Any, self.module).get_output_embeddings() if workload.max_new_tokens else None
        units = []
        bounced = False
        for unit in self.partition.units:
            block = factory.block([unit])
            bounced |= any(piece.bounced for load in block.loads for piece in load.pieces)
            cost = profile.compute_of(unit.name, self.sample(unit))
            is_head = head is not None and self.module.get_submodule(unit.module) is head
            units.append(
                UnitCost(
                    name=unit.name,
                    slot_bytes=tuple(load.slot_bytes for load in block.loads),
                    read_bytes=tuple(load.read_bytes for load in block.loads),
                    unpack_seconds=tuple(load.unpacked_bytes / rate for load in block.loads) if rate else (),
                    first_seconds=cost.seconds(workload.batch_size if is_head else prompt_tokens),
                    next_seconds=cost.seconds(workload.batch_size if workload.max_new_tokens else prompt_tokens),
                )
            )
        pinned = factory.pinned(self.partition.pinned)
        bounced |= any(piece.bounced for load in pinned.loads for piece in load.pieces)
        return Problem(
            units=units,
            num_in_pass=self.partition.num_in_pass,
            groups={name: self._groups(name) for name in GRANULARITIES},
            bandwidths=[
                Bandwidth(
                    num_agents=b.num_agents,
                    piece_bytes=b.piece_bytes,
                    bytes_per_second=min(b.bytes_per_second, profile.streaming_bytes_per_second or b.bytes_per_second),
                )
                for b in profile.bandwidths
            ],
            floor_bytes=floor_bytes,
            heap_bytes=self.heap_bytes,
            pinned_bytes=sum(load.slot_bytes for load in pinned.loads),
            buffer_bytes=factory.buffer_bytes if bounced else 0,
            num_passes=workload.num_passes,
            preparing_bytes=self.preparing_bytes,
            touch_seconds_per_byte=profile.touch_seconds_per_byte,
            num_cores=torch.get_num_threads(),
            quiet=profile.quiet_share(workload.batch_size if workload.max_new_tokens else prompt_tokens),
            boundary_seconds=profile.boundary_seconds,
            cold_seconds=profile.cold_seconds,
            unpacking_slows_compute=not profile.measured,
            windows=() if self.checkpoint.packed else profile.windows,  # unpacking, agents need room ahead of them
        )


def _unit_flops(trace: Trace, partition: Partition, unit: Unit) -> int:
    """Operations of a unit in the traced pass; a range of a head has its share of the head's."""
    flops = trace.flops.get(unit.module, 0)
    if unit.rows is None:
        return flops
    _, num_rows = partition.units[partition.heads[unit.module][-1]].rows or (0, 1)
    return flops * (unit.rows[1] - unit.rows[0]) // num_rows


def weight_bytes(module: nn.Module, weights: WeightMap) -> int:
    """Of all parameters and buffers that come from disk, in what they are computed with: quantised or not."""
    tensors: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return sum(
        source.nbytes if source.quantized else tensors[name].numel() * tensors[name].element_size()
        for name, source in weights.sources.items()
    )


def dtype_name(module: nn.Module) -> str:
    """Of the first floating-point parameter, as torch spells it ("float32")."""
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return str(found).removeprefix("torch.")
