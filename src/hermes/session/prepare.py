"""Everything about a model that can be known without reading a weight: skeleton, sources, trace, units, loads."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hermes.checkpoint import Checkpoint, Reader, open_checkpoint, open_reader, resolve_model
from hermes.errors import ModelError, ProfileError
from hermes.memory.arena import Arena
from hermes.memory.probe import memory_split
from hermes.memory.warm import Warmed
from hermes.model.blocks import Block, LoadFactory, torch_dtype
from hermes.model.inputs import example_inputs, max_length, vocabulary_size
from hermes.model.lean import lean_imports
from hermes.model.mapping import WeightMap, is_plain_linear, is_transformers_model, is_turned_linear, map_weights
from hermes.model.orders import deals_out_rows
from hermes.model.product import can_stay_packed, knows_rows, knows_turned, packed_step
from hermes.model.rows import KEPT_BYTES, READ_BYTES
from hermes.model.skeleton import build_skeleton, finish_skeleton
from hermes.model.trace import Trace, trace_apart
from hermes.model.units import (
    GRANULARITIES,
    HEAD_ROWS,
    MATRIX_ROWS,
    Granularity,
    Partition,
    Unit,
    group_units,
    partition,
    row_step,
)
from hermes.plan import Bandwidth, Problem, UnitCost
from hermes.profile import BlockSample, Profile, latest_profile
from hermes.session.beside import Beside
from hermes.session.known import stored_profile, trace_at
from hermes.session.workload import Workload, heap_bytes

__all__ = ["FORWARDS", "Prepared", "prepare_model", "prepare_module"]

logger = logging.getLogger("hermes")

CODE_BYTES = 84 * 2**20
"""Of libraries, and of the kernel for two processes, without which tracing reads the same code again and again."""
PACKED_HEAP_BYTES = 16 * 2**20
"""Tables of chunks, pieces that know how to unpack them, and rows that are unpacked for a product."""
QUANTIZED_HEAP_BYTES = 16 * 2**20
"""Rows of a quantised matrix that are made floats for a product, and what they pass through."""
RANGE_BYTES = 8 * 2**20
"""Ranges of rows that a matrix streams in, where its products round the same. A virtual disk fills a window of a few of
them, which stays in the processor's caches, a third faster than one of a few hundred MiB."""
PROCESS_BYTES = 256 * 2**20
"""About what a process takes besides weights."""
FORWARDS = 100
"""What is loaded from Python is planned to be used many times; what is run from the shell, once."""


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

    def lend(self, nbytes: int) -> Arena:
        """Memory for a moment: what was found for the weights, before they are there."""
        return Arena(nbytes) if self.warmed is None else self.warmed.lend(nbytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers that come from disk, in what they are computed with: quantised or not."""
        return _weight_bytes(self.module, self.weights)

    @property
    def heap_bytes(self) -> int:
        """What the workload takes besides weights."""
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

    @cached_property
    def gathered_bytes(self) -> Callable[[int], int]:
        """By the number of tokens of a pass: bytes of the largest matrix that they need whole, but comes otherwise."""
        return functools.cache(self._gathered_bytes)

    def _gathered_bytes(self, tokens: int) -> int:
        return max((self._unit_gathered_bytes(unit, tokens) for unit in self.partition.units if tokens), default=0)

    def _unit_gathered_bytes(self, unit: Unit, tokens: int) -> int:
        layer = cast(nn.Linear, self.module.get_submodule(unit.module))
        begin, end = unit.rows or (0, 0)
        if unit.module in self.partition.gathered and begin == 0 and not _knows_ranges(layer, tokens, end):
            return _nbytes(layer)
        if unit.parameters[0] not in self._stay_packed:
            return 0
        shape = (end - begin or layer.out_features, layer.in_features)
        step = packed_step(shape, tokens, layer.bias is not None, layer.out_features)
        return step * layer.in_features * layer.weight.element_size()

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
        """Of the first floating-point parameter, as torch spells it ("float32")."""
        return _dtype_name(self.module)

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
            cache_lines=not is_transformers_model(self.module),
            packed=self.checkpoint.packed,
            stay_packed=self._stay_packed,
        )

    @cached_property
    def _stay_packed(self) -> frozenset[str]:
        """Matrices that stay packed in memory: those of linear layers in a model that generates, a token at a time."""
        if not self.checkpoint.packed or not self.workload.max_new_tokens:
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


def _weight_bytes(module: nn.Module, weights: WeightMap) -> int:
    tensors: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return sum(
        source.nbytes if source.quantized else tensors[name].numel() * tensors[name].element_size()
        for name, source in weights.sources.items()
    )


def _dtype_name(module: nn.Module) -> str:
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return str(found).removeprefix("torch.")


def prepare_model(
    model: str | Path,
    *,
    workload: Workload,
    task: str | None = None,
    auto_class: str | type | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    head_rows: int = HEAD_ROWS,
    matrix_bytes: int | None = None,
    profile: str | Path | None = None,
    fresh: bool = False,
    limit_bytes: int = 0,
    room_bytes: int = 0,
) -> Prepared:
    """Resolve, build and trace a transformers model. Reads headers and configuration, no weights.

    A workload longer than the model's context is cut to it. `profile` is a file to take costs and trace from, else the
    stored one, or with `fresh` none. With `limit_bytes` a run of this process within them is prepared: memory is found
    for it meanwhile (`Beside`). `room_bytes` is the budget of a plan that nobody runs yet. Where neither holds all
    weights, large matrices are cut into ranges of rows, if products of those round like the whole one's, and put
    together where they do not; `matrix_bytes` cuts all that have more.

    Raises CheckpointError, ModelError, ProfileError.
    """
    directory = resolve_model(model, revision=revision)
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is a weight file without a configuration; give the model's directory, or use hermes.stream() "
            f"with a module of your own"
        )
    checkpoint = open_checkpoint(directory)
    likely = None if fresh or not limit_bytes else latest_profile(directory)
    with Beside(checkpoint, limit_bytes, workload, likely) as beside:
        with lean_imports():
            skeleton = build_skeleton(
                directory,
                auto_class=auto_class,
                task=task,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
            )
            weights = map_weights(skeleton, checkpoint)
            finish_skeleton(skeleton, weights)
        workload = workload.within(max_length(skeleton))
        if not skeleton.can_generate():
            workload = replace(workload, max_new_tokens=0)
        known = None
        if not fresh:
            known = stored_profile(
                directory, checkpoint, model_class=type(skeleton).__name__, dtype=_dtype_name(skeleton), path=profile
            )
        trace = trace_at(known, workload) if attn_implementation is None else None
        tracing_bytes = 0
        if trace is None:
            beside.tracing()
            trace, tracing_bytes = _trace(skeleton, workload)
        all_fits = _weight_bytes(skeleton, weights) + PROCESS_BYTES <= max(room_bytes, limit_bytes)
        gathers = matrix_bytes is None and not all_fits and trace is not None and _can_cut(skeleton, trace, workload)
        shares = _shares(skeleton)
        if gathers:
            matrix_bytes = RANGE_BYTES
            head_rows = MATRIX_ROWS if _dtype_name(skeleton) == "bfloat16" or shares > 1 else head_rows
        parts = partition(
            skeleton,
            weights,
            trace,
            head_rows=head_rows,
            matrix_bytes=matrix_bytes,
            gathers=gathers,
            shares=shares,
        )
        prepared = _prepared(skeleton, checkpoint, weights, trace, workload, directory, parts)
        if known is not None and not _covers(known, prepared, must=profile is not None):
            known = None
        warmed = beside.stop() if limit_bytes else None
    preparing_bytes = _preparing_bytes(tracing_bytes, held_bytes=0 if warmed is None else warmed.nbytes)
    return replace(prepared, known=known, preparing_bytes=preparing_bytes, warmed=warmed)


def _can_cut(skeleton: nn.Module, trace: Trace, workload: Workload) -> bool:
    """Whether all large matrices may stream in ranges: all passes round as with the whole ones, but for a prompt's."""
    head = cast(Any, skeleton).get_output_embeddings()
    large = [
        (trace.flops.get(name, 0), layer)
        for name, layer in skeleton.named_modules()
        if (is_plain_linear(layer) or is_turned_linear(layer)) and layer is not head and _nbytes(layer) > RANGE_BYTES
    ]
    return bool(large) and all(
        _knows_ranges(layer, tokens, row_step(_weight(layer).shape, _nbytes(layer), RANGE_BYTES, MATRIX_ROWS))
        for flops, layer in large
        if (tokens := workload.batch_size if workload.max_new_tokens else flops // (2 * _weight(layer).numel()))
    )


def _knows_ranges(layer: nn.Module, tokens: int, step: int) -> bool:
    weight = _weight(layer)
    shape = (weight.shape[0], weight.shape[1])
    if is_turned_linear(layer):
        return knows_turned(weight.dtype, tokens, shape, step)
    return knows_rows(weight.dtype, tokens, shape, step, cast(nn.Linear, layer).bias is not None)


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer.weight)


def _nbytes(layer: nn.Module) -> int:
    return _weight(layer).numel() * _weight(layer).element_size()


def _trace(skeleton: nn.Module, workload: Workload) -> tuple[Trace | None, int]:
    inputs = example_inputs(skeleton, batch_size=workload.batch_size, sequence_length=workload.sequence_length)
    if inputs is not None and workload.max_new_tokens and "decoder_input_ids" not in inputs:
        inputs |= {"use_cache": True, "logits_to_keep": 1}
    if inputs is None:
        return None, 0
    found, nbytes = trace_apart(skeleton, (), inputs)
    if found is None and "logits_to_keep" in inputs:  # a model that does not know the argument
        del inputs["logits_to_keep"]
        found, nbytes = trace_apart(skeleton, (), inputs)
    return found, nbytes


def _preparing_bytes(tracing_bytes: int, held_bytes: int = 0) -> int:
    return memory_split().anon_bytes - held_bytes + tracing_bytes + CODE_BYTES if tracing_bytes else 0


def _covers(profile: Profile, prepared: Prepared, *, must: bool) -> bool:
    """Whether every unit was measured, or can be predicted from those that were; raises ProfileError if it `must`."""
    try:
        for unit in prepared.partition.units:
            profile.compute_of(unit.name, prepared.sample(unit))
    except ProfileError as error:
        if must:
            raise
        logger.warning("%s (going on with an estimate)", error)
        return False
    return True


def prepare_module(
    module: nn.Module,
    checkpoint: str | Path,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    head_rows: int = HEAD_ROWS,
    matrix_bytes: int | None = None,
) -> Prepared:
    """The same for any module and its state-dict file; with example inputs its pass is traced, else it is found out."""
    path = resolve_model(checkpoint)
    opened = open_checkpoint(path)
    weights = map_weights(module, opened)
    finish_skeleton(module, weights)
    found, tracing_bytes = trace_apart(module, args, kwargs or {}) if args or kwargs else (None, 0)
    workload = Workload(sequence_length=1, num_forwards=FORWARDS)
    parts = partition(module, weights, found, head_rows=head_rows, matrix_bytes=matrix_bytes, shares=_shares(module))
    prepared = _prepared(module, opened, weights, found, workload, path, parts)
    return replace(prepared, preparing_bytes=_preparing_bytes(tracing_bytes))


def _shares(module: nn.Module) -> int:
    """Of a vocabulary's rows, one for each of torch's threads where what it leaves over is summed otherwise."""
    threads = torch.get_num_threads()
    return threads if _dtype_name(module) == "float32" and deals_out_rows(threads) else 1


def _prepared(
    module: nn.Module,
    checkpoint: Checkpoint,
    weights: WeightMap,
    found: Trace | None,
    workload: Workload,
    source: Path,
    parts: Partition,
) -> Prepared:
    if found is None:
        logger.info("control flow depends on values (or no example input was given): the first pass finds the order")
    return Prepared(
        module=module,
        checkpoint=checkpoint,
        weights=weights,
        trace=found,
        partition=parts,
        workload=workload,
        source=source,
    )
