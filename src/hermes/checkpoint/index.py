"""What a checkpoint holds and where each tensor's bytes lie. Parsing is in `safetensors` and `torch_zip`."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hermes.checkpoint.chunks import PackedFile

__all__ = ["DTYPE_BYTES", "Checkpoint", "Extent", "FileStamp", "QuantizedTensor", "TensorEntry"]

#: Bytes per element by dtype, spelt as in safetensors.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """A weight file as it was when the checkpoint was opened; readers refuse it once any of this has changed."""

    path: Path
    nbytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """`nbytes` contiguous bytes at `offset` of file number `file` in `Checkpoint.files`, unpacked if it is packed."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One stored tensor: row-major, little-endian, contiguous. `nbytes` of the extent is exactly shape x dtype.

    With `quantized` (in what `in_full` gives) it is a matrix that is stored otherwise, and the extent is of its values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent
    quantized: "QuantizedTensor | None" = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A matrix of `shape` in `bits` bits a weight, stored as two tensors; docs/format.md describes them.

    `errors` are the sums of the squares of what was lost and of what there was, where the file says so.
    """

    bits: int
    shape: tuple[int, int]
    values: TensorEntry
    scales: TensorEntry
    errors: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Every tensor of a model, read in place from the files it came in.

    Of a packed file (those that `packed` has, by number) extents are places in the file as it was before it was packed.
    `tensors` are those that are stored; `quantized` has the matrices that some of them make up, by name.
    """

    files: tuple[FileStamp, ...]
    tensors: Mapping[str, TensorEntry]
    packed: Mapping[int, PackedFile] = field(default_factory=dict)
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; those that several tensors share (tied weights, views) are counted once."""
        total = 0
        reached: dict[int, int] = {}
        for extent in sorted((e.extent for e in self.tensors.values()), key=lambda e: (e.file, e.offset)):
            end = extent.offset + extent.nbytes
            total += max(0, end - max(extent.offset, reached.get(extent.file, 0)))
            reached[extent.file] = max(end, reached.get(extent.file, 0))
        return total

    def fingerprint(self) -> str:
        """Hex digest of the files' names, sizes and times and of every tensor's place; stable across processes."""
        digest = hashlib.sha256()
        for stamp in self.files:
            digest.update(f"{stamp.path.name}|{stamp.nbytes}|{stamp.mtime_ns}\n".encode())
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}|{entry.extent.file}|{entry.extent.offset}\n".encode())
        return digest.hexdigest()[:32]
