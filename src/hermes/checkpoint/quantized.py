"""Quantised matrices in a safetensors file: how they are stored, and recognised without trusting the file.

The layout is that of torch's own CPU kernels, so that streaming converts nothing. `quantize` writes it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from hermes.checkpoint.index import Checkpoint, QuantizedTensor, TensorEntry
from hermes.errors import CheckpointError

__all__ = [
    "BITS",
    "ERRORS",
    "FORMAT",
    "GROUP",
    "METHOD",
    "SCALES",
    "STEP",
    "can_be_quantized",
    "in_full",
    "read_quantized",
    "stored_shapes",
]

METHOD = "hermes"
"""The `quant_method` of a config.json."""
FORMAT = "hermes-quant-1"
"""Of the metadata's "format"."""
ERRORS = "errors"
"""In the metadata: for each matrix, the squares of what was lost and of what there was, summed up."""
SCALES = ".scales"
"""Behind a matrix' name: the name of its scales."""
BITS = {"int8": 8, "int4": 4}
GROUP = 32
"""Columns that share a scale and a zero, in 4 bits."""
STEP = 64
"""The kernels take this many rows at a time, and columns in multiples of a group."""
_AGAIN = "quantise the model again"


def can_be_quantized(shape: tuple[int, ...]) -> bool:
    """Whether the kernels take a matrix of this shape."""
    return len(shape) == 2 and math.prod(shape) > 0 and shape[0] % STEP == 0 and shape[1] % GROUP == 0


def stored_shapes(bits: int, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the values and the scales of a matrix; never the matrix' own, which plain transformers would take for it."""
    if bits == 8:
        return (rows // STEP, STEP, columns), (rows,)
    return (rows // STEP, columns, STEP // 2), (columns // GROUP, rows, 2)


def read_quantized(
    path: Path, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> dict[str, QuantizedTensor]:
    """The quantised matrices of one file, by name. Raises CheckpointError where their parts do not fit together."""
    if metadata["format"] != FORMAT:
        raise CheckpointError(f"{path}: quantised as {metadata['format']}, this Hermes reads {FORMAT}; {_AGAIN}")
    errors = _errors(metadata.get(ERRORS, "{}"))
    found = {}
    for name, values in tensors.items():
        scales = tensors.get(name + SCALES)
        if scales is None or values.dtype not in ("I8", "U8"):
            continue
        bits = 8 if values.dtype == "I8" else 4
        blocks, *inner = values.shape or (0,)
        shape = (blocks * STEP, inner[-1 if bits == 8 else 0] if inner else 0)
        if (
            not can_be_quantized(shape)
            or scales.dtype not in ("BF16", "F32")
            or (values.shape, scales.shape) != stored_shapes(bits, *shape)
        ):
            raise CheckpointError(
                f"{path}: {name!r} is stored as {values.dtype} {list(values.shape)} with scales as {scales.dtype} "
                f"{list(scales.shape)}, which is no quantised matrix; {_AGAIN}"
            )
        found[name] = QuantizedTensor(bits=bits, shape=shape, values=values, scales=scales, errors=errors.get(name))
    return found


def in_full(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Every tensor by name, as if what is quantised were a matrix of floats."""
    parts = {entry.name for matrix in checkpoint.quantized.values() for entry in (matrix.values, matrix.scales)}
    entries = {name: entry for name, entry in checkpoint.tensors.items() if name not in parts}
    for name, matrix in checkpoint.quantized.items():
        dtype, extent = matrix.scales.dtype, matrix.values.extent
        entries[name] = TensorEntry(name=name, dtype=dtype, shape=matrix.shape, extent=extent, quantized=matrix)
    return entries


def _errors(text: str) -> dict[str, tuple[float, float]]:
    """What the file says was lost; nothing where that cannot be read, for nothing depends on it."""
    try:
        table = json.loads(text)
        return {str(name): (float(lost), float(there)) for name, (lost, there) in table.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
