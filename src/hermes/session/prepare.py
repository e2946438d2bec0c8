"""Everything about a model that can be known without reading a weight: skeleton, sources, trace, units, loads."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hermes.checkpoint import Checkpoint, open_checkpoint, resolve_model
from hermes.errors import InputError, ModelError, ProfileError
from hermes.memory.probe import memory_split
from hermes.model.binding import HOST
from hermes.model.inputs import example_inputs, max_length, moved
from hermes.model.lean import lean_imports
from hermes.model.mapping import WeightMap, map_weights
from hermes.model.skeleton import build_skeleton, finish_skeleton
from hermes.model.trace import Trace, trace_apart
from hermes.model.units import HEAD_ROWS, MATRIX_ROWS, Partition, partition
from hermes.profile import Profile, latest_profile
from hermes.session.beside import Beside
from hermes.session.known import stored_profile, trace_at
from hermes.session.prepared import Prepared, dtype_name, weight_bytes
from hermes.session.ranges import can_cut, row_shares
from hermes.session.workload import Workload

__all__ = ["FORWARDS", "prepare_model", "prepare_module"]

logger = logging.getLogger("hermes")

RANGE_BYTES = 8 * 2**20
"""Of the ranges that a matrix streams in. A virtual disk fills a window of a few of them, which stays in the
processor's caches, a third faster than one of a few hundred MiB."""
CODE_BYTES = 84 * 2**20
"""Of libraries, and of the kernel for two processes, without which tracing reads the same code again and again."""
PROCESS_BYTES = 256 * 2**20
"""About what a process takes besides weights."""
WHOLE_ROWS = 2**62
"""No head has more."""
FORWARDS = 100
"""What is loaded from Python is planned to be used many times; what is run from the shell, once."""


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
    device: torch.device = HOST,
) -> Prepared:
    """Resolve, build and trace a transformers model. Reads headers and configuration, no weights.

    A workload longer than the model's context is cut to it. `profile` is a file to take costs and trace from, else the
    stored one, or with `fresh` none. With `limit_bytes` a run of this process within them is prepared: memory is found
    for it meanwhile (`Beside`). `room_bytes` is the budget of a plan that nobody runs yet. Where neither holds all
    weights, large matrices are cut into ranges of rows, if products of those round like the whole one's, and put
    together where they do not; `matrix_bytes` cuts all that have more. For a `device` other than the CPU every
    matrix stays whole: who knows how its kernels round.

    Raises CheckpointError, ModelError, ProfileError.
    """
    on_host = device == HOST
    fresh = fresh or not on_host  # what was measured, was measured on the CPU
    directory = resolve_model(model, revision=revision)
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is a weight file without a configuration; give the model's directory, or use hermes.stream() "
            f"with a module of your own"
        )
    checkpoint = open_checkpoint(directory)
    _check_device(checkpoint, device)
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
            finish_skeleton(skeleton, weights, is_built=True)
        workload = workload.within(max_length(skeleton))
        if not skeleton.can_generate():
            workload = replace(workload, max_new_tokens=0)
        known = None
        if not fresh:
            known = stored_profile(
                directory, checkpoint, model_class=type(skeleton).__name__, dtype=dtype_name(skeleton), path=profile
            )
        trace = trace_at(known, workload) if attn_implementation is None else None
        tracing_bytes = 0
        if trace is None:
            beside.tracing()
            trace, tracing_bytes = _trace(skeleton, workload)
        all_fits = weight_bytes(skeleton, weights) + PROCESS_BYTES <= max(room_bytes, limit_bytes)
        gathers = (
            on_host
            and matrix_bytes is None
            and not all_fits
            and trace is not None
            and can_cut(skeleton, trace, workload, RANGE_BYTES)
        )
        shares = row_shares(dtype_name(skeleton))
        if gathers:
            matrix_bytes = RANGE_BYTES
            head_rows = MATRIX_ROWS if dtype_name(skeleton) == "bfloat16" or shares > 1 else head_rows
        parts = partition(
            skeleton,
            weights,
            trace,
            head_rows=head_rows if on_host else WHOLE_ROWS,
            matrix_bytes=matrix_bytes if on_host else None,
            gathers=gathers,
            shares=shares,
        )
        prepared = _prepared(skeleton, checkpoint, weights, trace, workload, directory, parts, device)
        if known is not None and not _covers(known, prepared, must=profile is not None):
            known = None
        warmed = beside.stop() if limit_bytes else None
    preparing_bytes = _preparing_bytes(tracing_bytes, held_bytes=0 if warmed is None else warmed.nbytes)
    return replace(prepared, known=known, preparing_bytes=preparing_bytes, warmed=warmed)


def _trace(skeleton: nn.Module, workload: Workload) -> tuple[Trace | None, int]:
    inputs = example_inputs(skeleton, batch_size=workload.batch_size, sequence_length=workload.sequence_length)
    if inputs is not None and workload.max_new_tokens and "decoder_input_ids" not in inputs:
        inputs |= {"use_cache": True, "logits_to_keep": 1}
    if inputs is None:
        return None, 0
    found, nbytes = trace_apart(skeleton, (), inputs)
    for doubtful in ("logits_to_keep", "pixel_values"):  # not every model knows it; images may want tokens in the text
        if found is None and len(inputs) > 1 and inputs.pop(doubtful, None) is not None:
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
    device: torch.device = HOST,
) -> Prepared:
    """The same for any module and its state-dict file; with example inputs its pass is traced, else it is found out.

    Matrices above `matrix_bytes` are cut into ranges of rows, on the CPU.
    """
    path = resolve_model(checkpoint)
    opened = open_checkpoint(path)
    _check_device(opened, device)
    weights = map_weights(module, opened)
    finish_skeleton(module, weights)
    args, kwargs = moved((args, dict(kwargs or {})), HOST)  # where it is traced
    found, tracing_bytes = trace_apart(module, args, kwargs) if args or kwargs else (None, 0)
    workload = Workload(sequence_length=1, num_forwards=FORWARDS)
    shares = row_shares(dtype_name(module))
    if device != HOST:
        head_rows, matrix_bytes = WHOLE_ROWS, None
    parts = partition(module, weights, found, head_rows=head_rows, matrix_bytes=matrix_bytes, shares=shares)
    prepared = _prepared(module, opened, weights, found, workload, path, parts, device)
    return replace(prepared, preparing_bytes=_preparing_bytes(tracing_bytes))


def _prepared(
    module: nn.Module,
    checkpoint: Checkpoint,
    weights: WeightMap,
    found: Trace | None,
    workload: Workload,
    source: Path,
    parts: Partition,
    device: torch.device,
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
        device=device,
    )


def _check_device(checkpoint: Checkpoint, device: torch.device) -> None:
    if device != HOST and checkpoint.quantized:
        raise InputError(
            f"device {device.type}: quantised matrices are multiplied by kernels of the CPU; "
            "use the unquantised model there"
        )
