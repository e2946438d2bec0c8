"""Linear layers whose matrices stay packed in memory, with the bits that torch computes from unpacked ones.

For few tokens the native module unpacks some rows into a core's own cache and multiplies them there: memory is read
once, at 11 bits a weight. It sums in the order of torch's own kernels (oneDNN: pairs of columns, in order, from nothing
again for each so many), which is found out by trying. For many tokens, and where no order fits, a few rows at a time
are unpacked and given to torch.
"""

import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hermes.checkpoint.chunks import ChunkRun
from hermes.checkpoint.decoder import check, encode_chunk, native
from hermes.checkpoint.layout import CHUNK_ELEMENTS
from hermes.model.units import MATRIX_ROWS
from hermes.pipeload import Place

__all__ = ["MOST_TOKENS", "PackedRows", "can_stay_packed", "summing_block"]

MOST_TOKENS = 16
"""Above, torch's own product and the unpacking before it are faster."""
TILE_BYTES = 4 * 2**20
"""Unpacked at a time for torch, or the fewest rows that round like the whole matrix."""
COLUMNS = 32
"""The native product takes multiples of this."""
BLOCKS = (512, 1024, 256, 2048)
"""Columns after which kernels were seen to begin a new sum, or might."""
PATTERN_ROWS = 64


def can_stay_packed(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether there is a product for packed matrices like this."""
    return native() is not None and dtype == torch.bfloat16 and len(shape) == 2 and shape[1] % COLUMNS == 0


class PackedRows:
    """Rows of one packed matrix: what `Bound` is to an unpacked one. Its product raises ReadError for a corrupt chunk.

    Args:
        run: the chunks, which lie in memory from the place on that `bind` is given.
        load: its number in the block.
        shape: rows and columns.
    """

    def __init__(self, run: ChunkRun, load: int, shape: tuple[int, int]) -> None:
        self.loads = range(load, load + 1)
        self._run = run
        self._places = run.places
        self._shape = shape
        self._storage: torch.UntypedStorage | None = None
        self._chunks = 0

    def bind(self, memory: Callable[[Place], torch.UntypedStorage], places: Sequence[Place]) -> None:
        """Point at the bytes; `places` are those of all loads of the block."""
        place = places[self.loads.start]
        self._storage = memory(place)
        self._chunks = self._storage.data_ptr() + place.offset

    def unbind(self) -> None:
        """Forget the bytes; they may be anybody's from now on."""
        self._storage, self._chunks = None, 0

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`functional.linear` with these rows, on torch's number of threads."""
        if not self._chunks:
            raise RuntimeError(f"{self._run.where} is not in memory")
        tokens = math.prod(x.shape[:-1])
        if 0 < tokens <= MOST_TOKENS and x.dtype == torch.bfloat16 and x.shape[-1] == self._shape[1]:
            block = summing_block(tokens, *self._shape, bias is not None, torch.get_num_threads())
            if block:
                return self._multiply(x.contiguous(), tokens, bias, block)
        return self._unpack_and_multiply(x, bias)

    def _multiply(self, x: torch.Tensor, tokens: int, bias: torch.Tensor | None, block: int) -> torch.Tensor:
        output = x.new_empty(*x.shape[:-1], self._shape[0])
        threads = torch.get_num_threads()
        result = native().multiply(
            *self._matrix,
            x=x.data_ptr(),
            tokens=tokens,
            bias=0 if bias is None else bias.data_ptr(),
            block=block,
            y=output.data_ptr(),
            y_stride=self._shape[0],
            scratch=_scratch(self._shape[1], threads),
            threads=threads,
        )
        check(result, self._run.where)
        return output

    def _unpack_and_multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, columns = self._shape
        step = max(1, TILE_BYTES // (2 * columns * MATRIX_ROWS)) * MATRIX_ROWS
        tile = torch.empty(min(step, rows), columns, dtype=torch.bfloat16)
        output = x.new_empty(*x.shape[:-1], rows)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            result = native().unpack_rows(
                *self._matrix, begin=begin, end=end, target=tile.data_ptr(), threads=torch.get_num_threads()
            )
            check(result, self._run.where)
            part = None if bias is None else bias[begin:end]
            output[..., begin:end] = functional.linear(x, tile[: end - begin], part)
        return output

    @property
    def _matrix(self) -> tuple[object, ...]:
        run = self._run
        return (self._chunks, run.nbytes, self._places, run.number, run.skip, *self._shape)


@functools.cache
def _scratch(columns: int, threads: int) -> bytearray:
    return bytearray(native().scratch_bytes(columns, threads))


@functools.cache
def summing_block(tokens: int, rows: int, columns: int, has_bias: bool, threads: int) -> int:
    """After so many columns torch's bf16 product of this shape begins a new sum on this machine; 0 if in no known way.

    By trying: products of numbers that cancel each other all but entirely, so that every other order gives other bits.
    Some milliseconds, and no more memory than a few rows: torch is shown the same ones again and again.
    """
    if not native().can_multiply():
        return 0
    generator = torch.Generator().manual_seed(columns)
    half = columns // 2
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    pattern = (torch.randn(PATTERN_ROWS, columns, generator=generator) / 64).bfloat16()
    # Products are exact in float32, so that what is left of such sums is their rounding alone, as large as this bias.
    x[:, half:] = x[:, :half].roll(7, dims=1)
    pattern[:, half:] = -pattern[:, :half].roll(7, dims=1)
    bias = (torch.randn(rows, generator=generator) / 2**18).bfloat16() if has_bias else None
    expected = _torch_product(x, pattern, rows, bias)
    if expected is None:
        return 0
    content = _bytes(pattern)
    chunk_bytes = 2 * CHUNK_ELEMENTS
    chunks = [
        encode_chunk(content[begin : begin + chunk_bytes], "BF16", 2, number)
        for number, begin in enumerate(range(0, len(content), chunk_bytes))
    ]
    packed = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8)
    places = np.cumsum([0, *map(len, chunks)], dtype=np.int64)
    for block in (*BLOCKS, columns):
        got = torch.empty(tokens, rows, dtype=torch.bfloat16)
        for begin in range(0, rows, PATTERN_ROWS):
            num_rows = min(PATTERN_ROWS, rows - begin)
            native().multiply(
                packed.data_ptr(), packed.numel(), places, 0, 0, num_rows, columns,
                x=x.data_ptr(), tokens=tokens, bias=0 if bias is None else bias[begin:].data_ptr(), block=block,
                y=got[:, begin:].data_ptr(), y_stride=rows, scratch=_scratch(columns, threads), threads=threads,
            )  # fmt: skip
        if torch.equal(got.view(torch.int16), expected.view(torch.int16)):
            return block
    return 0


def _torch_product(x: torch.Tensor, pattern: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor | None:
    """With a matrix of that many rows, in which the pattern's come again and again; None where it cannot be made."""
    content = _bytes(pattern)
    nbytes = len(content)
    if nbytes % mmap.PAGESIZE or not hasattr(os, "memfd_create"):
        return None
    times = -(-rows // PATTERN_ROWS)
    region = mmap.mmap(-1, times * nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    file = os.memfd_create("hermes-pattern")
    try:
        os.write(file, content)
        places = range(address, address + times * nbytes, nbytes)
        if not all(_map_over(place, nbytes, file) for place in places):
            return None
    finally:
        os.close(file)
    matrix = torch.frombuffer(region, dtype=torch.bfloat16)[: rows * pattern.shape[1]].view(rows, -1)
    return functional.linear(x, matrix, bias)


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _map_over(address: int, nbytes: int, file: int) -> bool:
    """Put the file's first bytes in the place of what is mapped there."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return bool(libc.mmap(address, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file, 0) == address)


_MAP_FIXED = 0x10
