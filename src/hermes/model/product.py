"""Linear layers: products with packed matrices, and faster ones with plain ones, with the bits that torch gives.

The native module multiplies in the order of torch's own kernels (of bf16 oneDNN's: pairs of columns, of float32 MKL's:
column after column, and both from nothing again for each so many), which is found out by trying. It does so where it is
faster: few tokens of bf16, where memory is the limit, from 4 to 512 of float32, where MKL spends a fifth of its time or
more on moving weights about. Else, and where no order fits, torch does it.

Packed rows are of bf16. They are unpacked into a core's own cache, so that memory is read once, at 11 bits a weight; for
many tokens, a few rows at a time for torch.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from hermes.checkpoint.chunks import ChunkRun
from hermes.checkpoint.decoder import check, native
from hermes.model.units import MATRIX_ROWS
from hermes.pipeload import Place

__all__ = ["MOST_TOKENS", "PackedRows", "can_stay_packed", "finish", "linear", "summing_block"]

MOST_TOKENS = 16
"""Of bf16; above, torch's own product and the unpacking before it are faster."""
FLOAT_TOKENS = range(4, 513)
"""Of float32; below and above, torch's own product is as fast."""
TILE_BYTES = 4 * 2**20
"""Unpacked at a time for torch, or the fewest rows that round like the whole matrix."""
COLUMNS = 32
"""The native product of bf16 takes multiples of this."""
PACKED_COLUMNS = 64
"""And, of packed rows, of this: no row begins within a block of the codec's."""
GROUP_ROWS = 16
"""And, of plain rows, of this."""
BLOCKS = (512, 1024, 256, 2048)
"""Columns after which kernels of bf16 were seen to begin a new sum, or might."""
FLOAT_BLOCKS = (192, 256, 320, 336, 384, 448, 512)
"""And kernels of float32."""
TRIED_BYTES = 4 * 2**20
"""Of a matrix to find the order of sums with."""


def can_stay_packed(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether there is a product for packed matrices like this."""
    return native() is not None and dtype == torch.bfloat16 and len(shape) == 2 and shape[1] % PACKED_COLUMNS == 0


def finish(run: ChunkRun, shape: tuple[int, int], chunks: memoryview, stays: bool) -> None:
    """Check the chunks of packed rows; put such as stay in memory in the order in which products need them, in place.

    Releases the interpreter lock. Raises ReadError.
    """
    run.check(chunks)
    if stays and native().can_multiply():
        scratch = torch.empty(native().interleave_bytes(shape[1]), dtype=torch.uint8)
        address = torch.frombuffer(chunks, dtype=torch.uint8).data_ptr()
        matrix = (address, run.nbytes, run.places, run.number, run.skip, *shape)
        native().interleave(*matrix, scratch=scratch.data_ptr())


class PackedRows:
    """Rows of one packed matrix: what `Bound` is to an unpacked one. Its product raises ReadError for a corrupt chunk.

    Args:
        run: the chunks, which lie in memory from the place on that `bind` is given.
        load: its number in the block.
        shape: rows and columns.
    """

    is_view = True

    def __init__(self, run: ChunkRun, load: int, shape: tuple[int, int]) -> None:
        self.loads = range(load, load + 1)
        self._run = run
        self._where = (run.nbytes, run.places, run.number, run.skip, *shape)
        self._shape = shape
        self._storage: torch.UntypedStorage | None = None
        self._matrix: tuple[object, ...] = ()  # as the native module is told of it

    def bind(self, memory: Callable[[Place], torch.UntypedStorage], places: Sequence[Place]) -> None:
        """Point at the bytes; `places` are those of all loads of the block."""
        place = places[self.loads.start]
        self._storage = memory(place)
        self._matrix = (self._storage.data_ptr() + place.offset, *self._where)

    def unbind(self) -> None:
        """Forget the bytes; they may be anybody's from now on."""
        self._storage, self._matrix = None, ()

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`functional.linear` with these rows, on torch's number of threads."""
        if not self._matrix:
            raise RuntimeError(f"{self._run.where} is not in memory")
        block = _block_for(x, torch.bfloat16, self._shape, bias)
        if not block:
            return self._unpack_and_multiply(x, bias)
        x = x.contiguous()
        what, output = _product(x, self._shape[0], bias, block)
        check(native().multiply_packed(*self._matrix, **what), self._run.where)
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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear`; by the native module where that is faster and has the same bits."""
    shape = (weight.shape[0], weight.shape[1])
    block = _block_for(x, weight.dtype, shape, bias) if weight.is_contiguous() else 0
    if not block or (weight.dtype == torch.bfloat16 and shape[0] % GROUP_ROWS):
        return functional.linear(x, weight, bias)
    return _multiply(x, weight, bias, block)


def _block_for(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], bias: torch.Tensor | None) -> int:
    """`summing_block` for these operands; 0 where the native product is not for them."""
    tokens = math.prod(x.shape[:-1])
    if x.dtype != dtype or x.shape[-1] != shape[1] or x.requires_grad or (bias is not None and bias.dtype != dtype):
        return 0
    if torch.is_autocast_enabled("cpu"):
        return 0
    return summing_block(dtype, tokens, *shape, bias is not None, torch.get_num_threads())


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: int) -> torch.Tensor:
    """By the native module, with a matrix as it lies there."""
    x = x.contiguous()
    what, output = _product(x, weight.shape[0], bias, block)
    if weight.dtype == torch.float32:
        scratch = torch.empty(native().float_scratch_bytes(what["tokens"], x.shape[-1]), dtype=torch.uint8)
        native().multiply_floats(weight.data_ptr(), *weight.shape, scratch=scratch.data_ptr(), **what)
    else:
        native().multiply(weight.data_ptr(), *weight.shape, **what)
    return output


def _product(x: torch.Tensor, rows: int, bias: torch.Tensor | None, block: int) -> tuple[dict[str, int], torch.Tensor]:
    """What the native module is told of the tokens, which the caller keeps, and where their products will be."""
    output = x.new_empty(*x.shape[:-1], rows)
    return {
        "x": x.data_ptr(),
        "tokens": math.prod(x.shape[:-1]),
        "bias": 0 if bias is None else bias.data_ptr(),
        "block": block,
        "y": output.data_ptr(),
        "y_stride": rows,
        "threads": torch.get_num_threads(),
    }, output


def summing_block(dtype: torch.dtype, tokens: int, rows: int, columns: int, has_bias: bool, threads: int) -> int:
    """After so many columns torch's product of this shape begins a new sum on this machine; 0 if in no known way.

    By trying, with at most `TRIED_BYTES` of rows: kernels deal rows out to threads, each of them summed alike. 0 too
    where the native module has no product for it, or a slower one.
    """
    if native() is None:
        return 0
    if dtype == torch.bfloat16:
        if not 0 < tokens <= MOST_TOKENS or columns % COLUMNS or not native().can_multiply():
            return 0
    elif dtype == torch.float32:
        # "tf32" and "bf16" allow torch to round floats first.
        exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        if tokens not in FLOAT_TOKENS or not columns or not exact or not native().can_multiply_floats():
            return 0
    else:
        return 0
    tried = max(GROUP_ROWS, TRIED_BYTES // (dtype.itemsize * columns))
    return _try_blocks(dtype, tokens, min(rows, tried), columns, has_bias, threads)


@functools.cache
def _try_blocks(dtype: torch.dtype, tokens: int, rows: int, columns: int, has_bias: bool, threads: int) -> int:
    """Some milliseconds: numbers whose products cancel each other all but entirely, so that every other order shows."""
    generator = torch.Generator().manual_seed(columns)
    half = columns // 2
    padded = -(-rows // GROUP_ROWS) * GROUP_ROWS
    x = _distinct_rows(tokens, columns, generator).to(dtype)
    weight = (_distinct_rows(padded, columns, generator) / 64).to(dtype)
    # Products of bf16 are exact in float32, so that what is left of such sums is rounding alone, as large as this bias.
    x[:, half : 2 * half] = x[:, :half].roll(7, dims=1)
    weight[:, half : 2 * half] = -weight[:, :half].roll(7, dims=1)
    bias = (torch.randn(padded, generator=generator) / 2**18).to(dtype) if has_bias else None
    expected = functional.linear(x, weight[:rows], None if bias is None else bias[:rows])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for block in (*BLOCKS, columns) if dtype == torch.bfloat16 else FLOAT_BLOCKS:
        got = _multiply(x, weight, bias, block)
        if torch.equal(got[:, :rows].view(bits), expected.view(bits)):
            return block
    return 0


def _distinct_rows(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, each row those of the one before moved by one: made ten times as fast as all anew."""
    return torch.randn(rows + columns, generator=generator).unfold(0, columns, 1)[:rows].contiguous()
