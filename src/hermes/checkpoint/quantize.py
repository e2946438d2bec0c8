"""Writes a quantised copy of a model: chosen matrices in 8 or 4 bits a weight, everything else bit for bit.

Files are written from front to back, a few megabytes at a time. A kill leaves a hidden directory, and the same request
goes on behind the last whole file in it, which has at most `SHARD_BYTES`. Values come of single operations on float32,
each rounded as IEEE 754 says, so that they do not depend on the machine.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint, Extent, TensorEntry
from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.pack import STAMP_NAME, WEIGHTS_NAME, write_index
from hermes.checkpoint.partial import Progress, add_up, copy_beside, partial_directory, sync
from hermes.checkpoint.quantized import BITS, ERRORS, FORMAT, GROUP, METHOD, SCALES, STEP, stored_shapes
from hermes.checkpoint.readers import Reader, open_reader
from hermes.checkpoint.unpack import read_unpacked
from hermes.errors import CheckpointError, InputError

__all__ = ["quantize", "quantize_rows"]

QUANTIZED_STAMP_NAME = "hermes-quantize.json"
SHARD_BYTES = 2**30
"""What is lost at most where a run was killed."""
READ_BYTES = 8 * 2**20
"""Read at a time."""
ROWS_BYTES = 2**20
"""Of these, what a core works on at a time, as float32."""
Array = NDArray[Any]


def quantize(
    source: Path, directory: Path, scheme: str, matrices: Sequence[str], *, progress: Progress | None = None
) -> Path:
    """Make `directory` a copy of the model directory at `source` with these tensors quantised; nothing if it is that.

    Holds some 50 MiB, and the scales of one matrix. The source may be packed. Raises CheckpointError, ReadError, and
    InputError for a source that is quantised, values that are not finite, a directory in the way or a failed write.

    Args:
        source: a directory with config.json.
        directory: to be made.
        scheme: "int8" or "int4".
        matrices: names of tensors of a shape that `can_be_quantized`.
        progress: told bytes of the source.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.quantized:
        raise InputError(f"{source} is quantised already; give the model that it was made from")
    shards = _shards(checkpoint, BITS[scheme], set(matrices))
    stamp = {
        "format": FORMAT,
        "scheme": scheme,
        "source": checkpoint.fingerprint(),
        "files": {shard.name: [part.entry.name for part in shard.parts if part.bits] for shard in shards},
    }
    try:
        with partial_directory(directory, QUANTIZED_STAMP_NAME, stamp) as partial:
            if partial is not None:
                _write_shards(partial, checkpoint, shards, progress)
                _write_beside(source, partial, scheme, shards)
    except OSError as error:
        raise InputError(
            f"cannot write {directory}: {error.strerror or error}; then run the same again: it goes on where it stopped"
        ) from error
    return directory


@dataclass(frozen=True)
class _Part:
    """One tensor of the source; `bits` is 0 where it stays as it is."""

    entry: TensorEntry
    bits: int

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of what is written for it."""
        entry = self.entry
        if not self.bits:
            return [(entry.name, entry.dtype, entry.shape)]
        values, scales = stored_shapes(self.bits, *entry.shape)
        return [
            (entry.name, "I8" if self.bits == 8 else "U8", values),
            (entry.name + SCALES, self.scales_dtype, scales),
        ]

    @property
    def scales_dtype(self) -> str:
        """The kernels for bf16 take scales in bf16 only; beside 4 bits that is precise enough, in half the bytes."""
        return "BF16" if self.bits == 4 or self.entry.dtype == "BF16" else "F32"

    @property
    def nbytes(self) -> int:
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for _, dtype, shape in self.stored())


@dataclass(frozen=True)
class _Shard:
    """One file to be written."""

    name: str
    parts: tuple[_Part, ...]

    def header(self, errors: Mapping[str, tuple[float, float]]) -> bytes:
        """Length word and JSON, filled up to a page. As long before the errors are known as after."""
        table = {
            part.entry.name: [f"{error:.6e}" for error in errors.get(part.entry.name, (0.0, 0.0))]
            for part in self.parts
            if part.bits
        }
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, ERRORS: json.dumps(table)}}
        end = 0
        for name, dtype, shape in itertools.chain.from_iterable(part.stored() for part in self.parts):
            begin, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        nbytes = -(-(len(text) + 8 + 64) // 4096) * 4096 - 8  # an exponent may have a digit more than that of 0
        return nbytes.to_bytes(8, "little") + text.ljust(nbytes)


def _shards(checkpoint: Checkpoint, bits: int, matrices: set[str]) -> list[_Shard]:
    entries = sorted(checkpoint.tensors.values(), key=lambda entry: (entry.extent.file, entry.extent.offset))
    for name in matrices:
        if name + SCALES in checkpoint.tensors:
            raise CheckpointError(f"{name}{SCALES}: the name of scales, but a tensor of the model; rename it")
    groups: list[list[_Part]] = [[]]
    filled = 0
    for entry in entries:
        part = _Part(entry, bits if entry.name in matrices else 0)
        if groups[-1] and filled + part.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.nbytes
    count = len(groups)
    return [
        _Shard(WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors", tuple(parts))
        for number, parts in enumerate(groups, 1)
    ]


def _write_shards(partial: Path, checkpoint: Checkpoint, shards: Sequence[_Shard], progress: Progress | None) -> None:
    advance = add_up(progress, sum(entry.extent.nbytes for entry in checkpoint.tensors.values()))
    with open_reader(checkpoint) as reader, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for shard in shards:
            if (partial / shard.name).exists():
                advance(sum(part.entry.extent.nbytes for part in shard.parts))
                continue
            unfinished = partial / f"{shard.name}.unfinished"
            errors = {}
            with open(unfinished, "wb") as out:
                out.write(shard.header({}))
                for part in shard.parts:
                    pieces = _pieces(reader, checkpoint, part.entry, advance)
                    if part.bits:
                        errors[part.entry.name] = _write_quantized(out, part, pieces, pool)
                    else:
                        out.writelines(pieces)
                out.seek(0)
                out.write(shard.header(errors))
            sync(unfinished)
            unfinished.rename(partial / shard.name)


def _pieces(
    reader: Reader, checkpoint: Checkpoint, entry: TensorEntry, advance: Callable[[int], None]
) -> Iterator[bytes]:
    """The tensor's bytes; of a matrix, in multiples of the rows that kernels take at a time."""
    extent = entry.extent
    num_rows = entry.shape[0] if len(entry.shape) == 2 else 0
    step = STEP * extent.nbytes // num_rows if num_rows and num_rows % STEP == 0 else 1
    at_a_time = max(1, READ_BYTES // max(step, 1)) * max(step, 1)
    for begin in range(0, extent.nbytes, at_a_time):
        nbytes = min(at_a_time, extent.nbytes - begin)
        piece = Extent(file=extent.file, offset=extent.offset + begin, nbytes=nbytes)
        yield b"".join(bytes(part) for part in read_unpacked(reader, checkpoint, piece))
        advance(nbytes)


def _write_quantized(
    out: BinaryIO, part: _Part, pieces: Iterator[bytes], pool: ThreadPoolExecutor
) -> tuple[float, float]:
    """Values, then scales; the squares of what was lost and of what there was."""
    entry = part.entry
    row_bytes = entry.extent.nbytes // entry.shape[0]
    step = max(1, ROWS_BYTES // (4 * entry.shape[1] * STEP)) * STEP
    scales: list[Array] = []
    lost = there = 0.0

    def work(rows: bytes) -> tuple[Array, Array, float, float]:
        weights = _floats(rows, entry.dtype).reshape(-1, entry.shape[1])
        return quantize_rows(weights, part.bits, _rounding(part.scales_dtype))

    for piece in pieces:
        rows = [piece[begin : begin + step * row_bytes] for begin in range(0, len(piece), step * row_bytes)]
        for values, found, more_lost, more in pool.map(work, rows):
            if not math.isfinite(more):
                raise InputError(f"{entry.name} has weights that are not finite; a model with these is not quantised")
            out.write(values.tobytes())
            scales.append(found)
            lost, there = lost + more_lost, there + more
    together = np.concatenate(scales)
    if part.bits == 4:
        together = together.transpose(1, 0, 2)
    out.write(_to_bytes(together, part.scales_dtype))
    return lost, there


def quantize_rows(
    weights: Array, bits: int, rounded: Callable[[Array], Array] = lambda scales: scales
) -> tuple[Array, Array, float, float]:
    """Values in the layout of docs/format.md, scales by row, and the squares of what was lost and of what there was.

    `weights` are float32, rows in multiples of `STEP` where `bits` is 4; `rounded` gives scales the precision in which
    they are stored, before values are chosen for them.
    """
    with np.errstate(all="ignore"):  # what is not finite shows in the squares
        return _int8(weights, rounded) if bits == 8 else _int4(weights, rounded)


def _int8(weights: Array, rounded: Callable[[Array], Array]) -> tuple[Array, Array, float, float]:
    scales = rounded(np.abs(weights).max(axis=1) / np.float32(127))
    values = _divided(weights, scales[:, None])
    np.clip(np.rint(values, out=values), -127, 127, out=values)
    lost = weights - values * scales[:, None]
    return values.astype(np.int8), scales, _square(lost), _square(weights)


def _int4(weights: Array, rounded: Callable[[Array], Array]) -> tuple[Array, Array, float, float]:
    num_rows, columns = weights.shape
    groups = weights.reshape(num_rows, columns // GROUP, GROUP)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scales = rounded((high - low) / np.float32(15))
    zeros = rounded(low + scales * np.float32(8))
    values = _divided(groups - zeros[..., None], scales[..., None])
    np.clip(np.rint(values, out=values), -8, 7, out=values)
    lost = groups - (values * scales[..., None] + zeros[..., None])
    codes = (values + np.float32(8)).astype(np.uint8).reshape(-1, 2, STEP // 2, columns)
    packed = codes[:, 0] | (codes[:, 1] << 4)
    return (
        np.ascontiguousarray(packed.transpose(0, 2, 1)),
        np.stack((scales, zeros), axis=2),
        _square(lost),
        _square(weights),
    )


def _divided(weights: Array, scales: Array) -> Array:
    """0 where the scale is."""
    quotient = np.zeros(weights.shape, np.float32)
    return np.divide(weights, scales, out=quotient, where=scales != 0)


def _square(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _floats(content: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _rounding(dtype: str) -> Callable[[Array], Array]:
    return (
        (lambda scales: (_bfloat16(scales).astype(np.uint32) << 16).view(np.float32)) if dtype == "BF16" else np.array
    )


def _bfloat16(values: Array) -> Array:
    """Rounded to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _to_bytes(scales: Array, dtype: str) -> bytes:
    return _bfloat16(scales).tobytes() if dtype == "BF16" else np.ascontiguousarray(scales, "<f4").tobytes()


def _write_beside(source: Path, partial: Path, scheme: str, shards: Sequence[_Shard]) -> None:
    """Index, configuration, tokenizer."""
    copy_beside(source, partial)
    for stale in ("hermes-synth.json", STAMP_NAME):
        (partial / stale).unlink(missing_ok=True)
    path = partial / "config.json"
    config = json.loads(path.read_bytes())
    config["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, "bits": BITS[scheme]}
    if scheme == "int4":
        config["quantization_config"]["group_size"] = GROUP
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    names = {name: shard.name for shard in shards for part in shard.parts for name, *_ in part.stored()}
    write_index(partial, names, sum(part.nbytes for shard in shards for part in shard.parts))
