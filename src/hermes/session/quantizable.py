"""Which matrices of a model may be quantised: those that one linear layer multiplies by, as they are stored."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hermes.checkpoint import Extent
from hermes.checkpoint.quantized import GROUP, STEP, can_be_quantized
from hermes.errors import InputError
from hermes.model.mapping import is_plain_linear, weight_of
from hermes.session.prepare import prepare_model
from hermes.session.prepared import Prepared
from hermes.session.workload import Workload

__all__ = ["Quantizable", "find_quantizable"]

_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class Quantizable:
    """What there is to quantise.

    Attributes:
        matrices: names of tensors on disk.
        left: linear layers that keep their precision, by the reason.
    """

    matrices: tuple[str, ...]
    left: Counter[str]


def find_quantizable(model: Path) -> Quantizable:
    """Build and trace the model, and look. Reads no weights. Raises as `prepare_model`, and InputError for none."""
    prepared = prepare_model(model, workload=Workload(sequence_length=8), fresh=True, room_bytes=sys.maxsize)  # whole
    names = {entry.extent: entry.name for entry in prepared.checkpoint.tensors.values()}
    streamed = {
        (unit.module, name) for unit in prepared.partition.units if unit.rows is None for name in unit.parameters
    }
    matrices: dict[str, None] = {}
    left: Counter[str] = Counter()
    for path, module in prepared.module.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parameter = weight_of(path)
        name = _stored_name(prepared, parameter, names)
        if reason := _reason(prepared, path, module, is_plain=name is not None, streams=(path, parameter) in streamed):
            left[reason] += 1
        elif name is not None:
            matrices[name] = None
    if not matrices:
        why = "; ".join(f"{reason} ({count})" for reason, count in left.items()) or "it has no linear layers"
        raise InputError(f"{model}: no matrix can be quantised: {why}")
    return Quantizable(matrices=tuple(matrices), left=left)


def _stored_name(prepared: Prepared, parameter: str, names: Mapping[Extent, str]) -> str | None:
    """Of the one tensor on disk that is the layer's matrix."""
    source = prepared.weights.sources.get(parameter)
    if source is None or source.convert is not None or len(source.extents) != 1 or source.dtype not in _DTYPES:
        return None
    return names.get(source.extents[0])


def _reason(prepared: Prepared, path: str, module: nn.Linear, *, is_plain: bool, streams: bool) -> str | None:
    """Why a linear layer keeps its precision; None if it need not."""
    model: Any = prepared.module
    if module is model.get_output_embeddings() or path in prepared.partition.heads:
        return "vocabulary head"
    if not can_be_quantized(tuple(module.weight.shape)):
        return f"rows no multiple of {STEP} or columns of {GROUP}"
    if not is_plain or not is_plain_linear(module):
        return "merged, shared or computed in another way"
    return None if streams else "small, or used in several places"
