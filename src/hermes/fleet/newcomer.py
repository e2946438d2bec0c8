"""A model as a fleet is given it: prepared, with a call of it to be measured by. How it is measured is `measuring`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hermes.errors import InputError
from hermes.model.inputs import example_inputs, moved
from hermes.session import Prepared, Workload, prepare_model, prepare_module

__all__ = ["have_parts_in_common", "prepare_newcomer", "skeleton_bytes"]

SKELETON_BYTES_PER_MODULE = 16 * 2**10


def prepare_newcomer(
    name: str,
    model: nn.Module | str | Path,
    checkpoint: str | Path | None,
    *,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    workload: Workload,
    matrix_bytes: int,
    device: torch.device,
) -> tuple[Prepared, Callable[[Any], object]]:
    """As `Fleet.add` has it. Raises InputError, and as `prepare_module` and `prepare_model` do."""
    if isinstance(model, nn.Module):
        if checkpoint is None or not (example_args or example_kwargs):
            raise InputError(f"{name}: a module needs its checkpoint and example_args, to be measured with")
        prepared = prepare_module(
            model.eval(),
            checkpoint,
            args=example_args,
            kwargs=example_kwargs,
            matrix_bytes=matrix_bytes,
            device=device,
        )
        inputs = dict(example_kwargs or {})
    else:
        prepared = prepare_model(model, workload=workload, matrix_bytes=matrix_bytes, device=device)
        inputs = (
            example_inputs(prepared.module, batch_size=workload.batch_size, sequence_length=workload.sequence_length)
            or {}
        )
    args, kwargs = moved((example_args, inputs), device)
    return prepared, lambda module: module(*args, **kwargs)


def skeleton_bytes(prepared: Prepared) -> int:
    """About what the model takes without its weights."""
    return SKELETON_BYTES_PER_MODULE * sum(1 for _ in prepared.module.modules())


def have_parts_in_common(one: nn.Module, other: nn.Module) -> bool:
    """Whether a module with weights is in both: it could pull its weights for one of them alone."""
    parts = {id(part) for part in one.modules() if any(True for _ in part.parameters(recurse=False))}
    return any(id(part) in parts for part in other.modules())
