"""The header of a safetensors file, read without trusting a word of it. The tensors' bytes are not read here.

Everything safetensors' own reader refuses is refused (holes and overlaps too), so that no entry ever points outside
the file or disagrees with its shape. Format: 8 bytes little-endian header length, the header as JSON, the data.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from hermes.checkpoint.index import DTYPE_BYTES, Extent, TensorEntry
from hermes.checkpoint.readers import forget, stop_readahead
from hermes.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "parse_header", "read_header", "read_header_text"]

#: safetensors' own limit.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_AGAIN = "download or save the file again"


def read_header(path: Path, file: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors (in order of their offsets) and metadata of the file at `path`, number `file` of its checkpoint.

    Every extent lies inside the file, no two overlap, and each is exactly shape x dtype long. Raises CheckpointError.
    """
    try:
        text, file_bytes = read_header_text(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_header(path, file, text, file_bytes)


def parse_header(
    path: Path, file: int, text: bytes, file_bytes: int | None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The same from the header's JSON; `file_bytes` is None where the file that it describes is not at hand."""
    try:
        # safetensors' padding comes behind the header, never before it.
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique) if text[:1] == b"{" else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON ({_one_line(error)}); {_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON table of tensors; {_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of text; {_AGAIN}")
    start = 8 + len(text)
    end = _MAX_SIZE if file_bytes is None else file_bytes
    entries = [_entry(path, file, name, fields, start, end) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.extent.offset, entry.extent.nbytes))
    if file_bytes is None:
        file_bytes = max((entry.extent.offset + entry.extent.nbytes for entry in entries), default=start)
    _refuse_gaps(path, entries, start, file_bytes)
    return {entry.name: entry for entry in entries}, metadata


def read_header_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON, padding included, and the size of the file. Raises CheckpointError, OSError."""
    with open(path, "rb") as stream:
        stop_readahead(stream.fileno())
        file_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {file_bytes} bytes, too short for a safetensors header of 8; {_AGAIN}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header length {length} is over the limit of {MAX_HEADER_BYTES} bytes: "
                f"not a safetensors file, or a corrupt one; {_AGAIN}"
            )
        if 8 + length > file_bytes:
            raise CheckpointError(f"{path}: header of {length} bytes in a file of {file_bytes}: truncated; {_AGAIN}")
        text = stream.read(length)
        forget(stream.fileno(), 0, 8 + length)
    return text, file_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} appears twice")
    return table


def _entry(path: Path, file: int, name: str, fields: object, start: int, file_bytes: int) -> TensorEntry:
    """One tensor of the header; CheckpointError unless it lies in the file and its numbers agree."""
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: tensor {name!r} is not described by a table; {_AGAIN}")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise CheckpointError(f"{path}: tensor {name!r} has unknown dtype {_shown(dtype)}; known are {known}")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has no valid shape ({_shown(shape)}): at most {_MAX_DIMENSIONS} whole numbers "
            f"from 0 to 2**63 - 1; {_AGAIN}"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor {name!r} has no valid data_offsets ({_shown(offsets)}); {_AGAIN}")
    begin, end = offsets
    if start + end > file_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} ends at byte {start + end}, the file at {file_bytes}: truncated; {_AGAIN}"
        )
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise CheckpointError(
            f"{path}: tensor {name!r} has {end - begin} bytes, {dtype} of shape {shape} needs {needed}; {_AGAIN}"
        )
    extent = Extent(file=file, offset=start + begin, nbytes=needed)
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), extent=extent)


def _sizes(value: object) -> TypeGuard[list[int]]:
    """True for a list of whole numbers from 0 to 2**63 - 1; a bool is not a number here."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _refuse_gaps(path: Path, entries: Iterable[TensorEntry], start: int, file_bytes: int) -> None:
    """Sorted tensors must cover the data without overlap or hole: anything else hides bytes or aliases them."""
    reached, previous = start, "the header"
    for entry in entries:
        offset = entry.extent.offset
        if offset != reached:
            fault = "overlaps" if offset < reached else "leaves a hole behind"
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} at byte {offset} {fault} {previous}, which ends at {reached}; {_AGAIN}"
            )
        reached, previous = offset + entry.extent.nbytes, f"tensor {entry.name!r}"
    if reached != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - reached} bytes belong to no tensor: {previous} ends at {reached}, "
            f"the file at {file_bytes}; {_AGAIN}"
        )


def _shown(value: object) -> str:
    """A value from the header for a message: short, on one line, and never walking into nested tables."""
    if isinstance(value, list) and len(value) <= 8 and all(isinstance(item, int) for item in value):
        return str(value)[:80]
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
