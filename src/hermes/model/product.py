"""Linear layers: products with packed matrices, and faster ones with plain ones, with the bits that torch gives.

The native module multiplies (`kernels`) where it is faster and sums in torch's order (`orders`): few tokens of bf16 and
one of float32, where memory is the limit, and from 4 to 512 of float32, where MKL spends up to a third of its time on
moving weights about. Everything else torch does.

Packed rows are of bf16. They are unpacked into a core's own cache, so that memory is read once, at 11 bits a weight;
for many tokens, a few rows at a time for torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hermes.checkpoint.chunks import ChunkRun
from hermes.checkpoint.decoder import check, native
from hermes.model.kernels import can_multiply, first_in_quad, multiply, multiply_token, multiply_turned, operands
from hermes.model.orders import GROUP_ROWS, adds_like_torch, summing_block, sums_like_torch
from hermes.model.units import MATRIX_ROWS
from hermes.pipeload import Place

__all__ = ["PackedRows", "can_stay_packed", "finish", "linear", "try_order", "turned"]

TILE_BYTES = 4 * 2**20
"""Unpacked at a time for torch, or the fewest rows that round like the whole matrix."""
PACKED_COLUMNS = 64
"""The native product takes packed rows of multiples of this: none begins within a block of the codec's."""

_FLOATS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
"""Its precision of "tf32" or "bf16" allows torch to round floats before it multiplies them."""


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
        what, output = operands(x, self._shape[0], bias, block)
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
    if weight.is_contiguous():
        if _is_one_float(x, weight, shape[1], bias) and sums_like_torch(
            *shape, bias is not None, first_in_quad(weight)
        ):
            return multiply_token(x, weight, bias)
        block = _block_for(x, weight.dtype, shape, bias)
        if block and (weight.dtype != torch.bfloat16 or not shape[0] % GROUP_ROWS):
            return multiply(x, weight, bias, block)
    return functional.linear(x, weight, bias)


def try_order(layer: nn.Linear, tokens: int) -> None:
    """Find out now what `linear` would at its first use with so many tokens of this layer."""
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    summing_block(layer.weight.dtype, tokens, *shape, layer.bias is not None, torch.get_num_threads())


def turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight + bias` as `torch.addmm` gives it: what transformers' Conv1D is; likewise."""
    rows, columns = weight.shape
    if weight.is_contiguous() and _is_one_float(x, weight, rows, bias) and adds_like_torch(*weight.shape):
        return multiply_turned(x, weight, bias)
    return torch.addmm(bias, x.view(-1, rows), weight).view(*x.shape[:-1], columns)


def _is_one_float(x: torch.Tensor, weight: torch.Tensor, columns: int, bias: torch.Tensor | None) -> bool:
    """Whether this is one token of float32, for one of the native products."""
    return (
        weight.dtype == torch.float32
        and x.numel() == columns == x.shape[-1]
        and _is_exact(x, torch.float32, bias)
        and can_multiply(torch.float32)
    )


def _block_for(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], bias: torch.Tensor | None) -> int:
    """`summing_block` for these operands; 0 where the native product is not for them."""
    if x.shape[-1] != shape[1] or not _is_exact(x, dtype, bias):
        return 0
    return summing_block(dtype, math.prod(x.shape[:-1]), *shape, bias is not None, torch.get_num_threads())


def _is_exact(x: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> bool:
    """Whether operands are of this type, and torch multiplies them as they are."""
    return (
        x.dtype == dtype
        and not x.requires_grad
        and (bias is None or bias.dtype == dtype)
        and not torch.is_autocast_enabled("cpu")
        and (dtype != torch.float32 or _FLOATS.fp32_precision in ("none", "ieee"))
    )
