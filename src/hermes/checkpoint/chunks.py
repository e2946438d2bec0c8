"""Where the chunks of packed tensors lie: arithmetic from ranges of the unpacked file to runs of chunks.

Everybody else keeps to the places of the unpacked file: entries, extents and row ranges speak of offsets in it. The
tables come from `packed`; what a chunk looks like is in `codec`.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hermes.checkpoint.decoder import check_chunks, decode_chunks
from hermes.checkpoint.layout import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ChunkRun", "PackedFile", "PackedTensor", "num_chunks"]


def num_chunks(numel: int) -> int:
    """Of a tensor."""
    return -(-numel // CHUNK_ELEMENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """`nbytes` that lie at `begin` of the unpacked file; chunk i is at `places[i]` to `places[i + 1]` of this one."""

    name: str
    path: Path
    item_bytes: int
    begin: int
    nbytes: int
    places: "NDArray[np.int64]"

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk when it is unpacked."""
        return CHUNK_ELEMENTS * self.item_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRun:
    """Chunks of one tensor that lie beside each other: `nbytes` at `offset`, of which `unpacked_bytes` are wanted.

    They begin at element `skip` of the first chunk, whose number is `number`.
    """

    tensor: PackedTensor
    offset: int
    nbytes: int
    number: int
    skip: int
    unpacked_bytes: int

    @property
    def places(self) -> "NDArray[np.int64]":
        """Of these chunks in their file, and where the last one ends."""
        places = self.tensor.places
        return places[self.number : int(places.searchsorted(self.offset + self.nbytes)) + 1]

    @property
    def where(self) -> str:
        """What an error names."""
        return f"{self.tensor.path}: tensor {self.tensor.name!r}"

    def check(self, chunks: memoryview) -> None:
        """Raise ReadError unless these are the bytes of this run as they were written."""
        check_chunks(chunks, where=self.where, number=self.number)

    def decoder(self) -> Callable[[memoryview, memoryview], None]:
        """Unpacks the bytes of this run (first) into memory (second), checking them. Raises ReadError."""
        return functools.partial(
            decode_chunks,
            where=self.where,
            item_bytes=self.tensor.item_bytes,
            number=self.number,
            skip=self.skip,
        )


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """The tensors of one packed file that have any bytes, in order."""

    tensors: Sequence[PackedTensor]

    @property
    def largest_chunk_bytes(self) -> int:
        """Packed, of all tensors."""
        return max((int((tensor.places[1:] - tensor.places[:-1]).max()) for tensor in self.tensors), default=0)

    @property
    def largest_unpacked_bytes(self) -> int:
        """Of a chunk when it is unpacked."""
        return max((min(tensor.chunk_bytes, tensor.nbytes) for tensor in self.tensors), default=0)

    def run(self, offset: int, nbytes: int) -> ChunkRun:
        """The chunks that hold these bytes of one tensor."""
        (run,) = self.runs(offset, nbytes, run_bytes=2**62)
        return run

    def runs(
        self, offset: int, nbytes: int, *, run_bytes: int, unpacked_bytes: int | None = None
    ) -> Iterator[ChunkRun]:
        """The chunks that hold bytes `offset` to `offset + nbytes` of the unpacked file, which may span tensors.

        In order, in runs of at most `run_bytes` on disk, and of `unpacked_bytes` in memory if that is given, but one
        chunk at least.
        """
        end = offset + nbytes
        first = bisect.bisect_right(self.tensors, offset, key=lambda tensor: tensor.begin) - 1
        for tensor in self.tensors[max(first, 0) :]:
            low, high = max(offset, tensor.begin) - tensor.begin, min(end, tensor.begin + tensor.nbytes) - tensor.begin
            if end <= tensor.begin:
                return
            while low < high:
                number = low // tensor.chunk_bytes
                last = -(-high // tensor.chunk_bytes)  # not any more
                place = int(tensor.places[number])
                fitting = int(tensor.places.searchsorted(place + run_bytes, side="right")) - 1
                if unpacked_bytes is not None:
                    fitting = min(fitting, number + unpacked_bytes // tensor.chunk_bytes)
                last = min(last, max(fitting, number + 1))
                wanted = min(last * tensor.chunk_bytes, high) - low
                yield ChunkRun(
                    tensor=tensor,
                    offset=place,
                    nbytes=int(tensor.places[last]) - place,
                    number=number,
                    skip=(low - number * tensor.chunk_bytes) // tensor.item_bytes,
                    unpacked_bytes=wanted,
                )
                low += wanted
