"""Linear layers: products with packed matrices, and faster ones with plain ones, with the bits that torch gives.

The native module multiplies (`kernels`) where it is faster and sums in torch's order (`orders`): few tokens of bf16 and
one of float32, where memory is the limit, and from 4 to 512 of float32, where MKL spends up to a third of its time on
moving weights about; and where a matrix comes in ranges of rows, which torch would sum otherwise. Everything else torch
does.

Packed rows are of bf16. They are unpacked into a core's own cache, so that memory is read once, at 11 bits a weight;
for many tokens, a few rows at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hermes.checkpoint.chunks import ChunkRun
from hermes.checkpoint.decoder import check, native
from hermes.model.kernels import (
    QUAD_ROWS,
    Ranges,
    Sums,
    TokenOrder,
    can_multiply,
    first_in_quad,
    multiply,
    multiply_token,
    multiply_turned,
    operands,
)
from hermes.model.orders import (
    GROUP_ROWS,
    deals_out_rows,
    order_of_columns,
    order_of_sums,
    order_of_token,
    rounds_in_ranges,
)
from hermes.model.units import MATRIX_ROWS, row_step
from hermes.pipeload import Place

__all__ = [
    "PackedRows",
    "Ranges",
    "can_stay_packed",
    "finish",
    "is_exact",
    "knows_rows",
    "knows_turned",
    "linear",
    "multiply_range",
    "packed_step",
    "slows_ranges",
    "try_order",
    "turned",
    "turned_rows",
]

TILE_BYTES = 4 * 2**20
"""Unpacked at a time where they are not multiplied as they are, if so few rows round like the whole matrix."""
FASTER_TOKENS = {192: 512}
"""Of float32, by the block of torch's sums: up to so many tokens the native product is faster than MKL's."""
FASTER_TOKENS_ELSE = 160
FASTER_HALVES = 32
"""The same of bf16."""
MOST_PACKED_TOKENS = 80
"""The matrix unit takes so many at once: rows are unpacked once for them."""
PACKED_COLUMNS = 64
"""The native product takes packed rows, and sums, of multiples of this: none begins within a block of the codec's."""

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
        whole_rows: of the matrix, where these are some of its rows: products have the bits of those with all of it.
    """

    is_view = True

    def __init__(self, run: ChunkRun, load: int, shape: tuple[int, int], whole_rows: int | None = None) -> None:
        self.loads = range(load, load + 1)
        self._run = run
        self._where = (run.nbytes, run.places, run.number, run.skip, *shape)
        self._shape = shape
        self._whole_rows = shape[0] if whole_rows is None else whole_rows
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
        sums = _sums_for(x, torch.bfloat16, (self._whole_rows, self._shape[1]), bias)
        if sums is None or not _stays_packed(sums, x.numel() // self._shape[1]):
            return self._unpack_and_multiply(x, bias)
        what, output = operands(x, self._shape[0], bias, sums)
        check(native().multiply_packed(*self._matrix, **what), self._run.where)
        return output

    def multiply_range(self, ranges: Ranges, begin: int, bias: torch.Tensor | None) -> None:
        """`linear` into the place of these rows in the output."""
        ranges.put(begin, self.linear(ranges.x, bias))

    def write_to(self, target: torch.Tensor) -> None:
        """Unpack all of them into contiguous rows."""
        self._unpack(0, self._shape[0], target)

    def _unpack(self, begin: int, end: int, target: torch.Tensor) -> None:
        threads = torch.get_num_threads()
        result = native().unpack_rows(*self._matrix, begin=begin, end=end, target=target.data_ptr(), threads=threads)
        check(result, self._run.where)

    def _unpack_and_multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, columns = self._shape
        tokens = x.numel() // columns
        step = rows
        if is_exact(x, torch.bfloat16, bias):
            step = packed_step(self._shape, tokens, bias is not None, self._whole_rows) or rows
        tile = torch.empty(step, columns, dtype=torch.bfloat16)
        output = x.new_empty(*x.shape[:-1], rows)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            self._unpack(begin, end, tile)
            part = None if bias is None else bias[begin:end]
            output[..., begin:end] = linear(x, tile[: end - begin], part, self._whole_rows)
        return output


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, whole_rows: int | None = None
) -> torch.Tensor:
    """`functional.linear`; by the native module where that is faster and has the same bits.

    `weight` may be some rows of a matrix of `whole_rows`: the bits are then those of the product with all of it, where
    `knows_rows` says so. One token of float32 that MKL sums in "lanes" it multiplies as fast.
    """
    rows, columns = weight.shape
    if not weight.is_contiguous():
        return functional.linear(x, weight, bias)
    if (order := _order_for(x, weight, bias, whole_rows)) is not None:
        return multiply_token(x, weight, bias, order)
    if whole_rows is None and _is_torchs(weight.dtype, math.prod(x.shape[:-1])):
        return functional.linear(x, weight, bias)
    sums = _sums_for(x, weight.dtype, (rows if whole_rows is None else whole_rows, columns), bias)
    if sums is not None and (whole_rows is not None or x.numel() <= _faster_tokens(weight.dtype, sums) * columns):
        if weight.dtype == torch.float32 or not rows % GROUP_ROWS:
            return multiply(x, weight, bias, sums)
    return functional.linear(x, weight, bias)


def multiply_range(
    ranges: Ranges, begin: int, weight: torch.Tensor, bias: torch.Tensor | None, whole_rows: int
) -> None:
    """`linear` of the rows from `begin` on of a matrix, into their place in the output."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        if (order := _order_for(ranges.x, weight, bias, whole_rows)) is not None:
            return ranges.multiply_token(begin, weight, bias, order)
        sums = _sums_for(ranges.x, weight.dtype, (whole_rows, weight.shape[1]), bias)
        if sums is not None:
            return ranges.multiply(begin, weight, bias, sums)
    ranges.put(begin, linear(ranges.x, weight, bias, whole_rows))


def try_order(layer: nn.Linear, tokens: int) -> None:
    """Find out now what `linear` would at its first use with so many tokens of this layer, whole."""
    if _is_torchs(layer.weight.dtype, tokens):
        return
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    order_of_sums(layer.weight.dtype, tokens, *shape, layer.bias is not None, torch.get_num_threads())


def _is_torchs(dtype: torch.dtype, tokens: int) -> bool:
    """Whether torch is faster with a whole matrix whatever the order of its sums, which need not be tried then."""
    return dtype == torch.bfloat16 and tokens > FASTER_HALVES


def packed_step(shape: tuple[int, int], tokens: int, has_bias: bool, whole_rows: int) -> int:
    """Rows of packed ones that are unpacked at a time: all of them, if fewer round otherwise; 0 if none are."""
    rows, columns = shape
    sums = order_of_sums(torch.bfloat16, tokens, whole_rows, columns, has_bias, torch.get_num_threads())
    if sums is not None and _stays_packed(sums, tokens):
        return 0
    step = row_step(shape, 2 * rows * columns, TILE_BYTES, MATRIX_ROWS)
    return min(step, rows) if knows_rows(torch.bfloat16, tokens, (whole_rows, columns), step, has_bias) else rows


def _stays_packed(sums: Sums, tokens: int) -> bool:
    """Whether packed rows are multiplied as they are."""
    return tokens <= MOST_PACKED_TOKENS and not sums.block % PACKED_COLUMNS


def knows_rows(dtype: torch.dtype, tokens: int, shape: tuple[int, int], step: int, has_bias: bool) -> bool:
    """Whether `linear` of each `step` rows of a matrix, told of the whole, has the bits of torch's product with it all.

    Found out by trying, once for each number of tokens. `step` is a multiple of `MATRIX_ROWS`.
    """
    threads = torch.get_num_threads()
    if dtype == torch.float32 and tokens == 1:  # each row is summed alike, but for what threads leave over of four
        return not shape[0] % (QUAD_ROWS * threads)
    is_known = order_of_sums(dtype, tokens, *shape, has_bias, threads) is not None
    if dtype == torch.bfloat16:
        is_known = is_known and not shape[0] % GROUP_ROWS
        return is_known or rounds_in_ranges(tokens, *shape, step, has_bias, threads)
    return dtype == torch.float32 and is_known


def slows_ranges(dtype: torch.dtype, tokens: int, shape: tuple[int, int], has_bias: bool) -> bool:
    """Whether torch's product with a matrix is faster than the native ones with its ranges of rows."""
    sums = order_of_sums(dtype, tokens, *shape, has_bias, torch.get_num_threads()) if dtype == torch.float32 else None
    return sums is not None and tokens > _faster_tokens(dtype, sums)


def _faster_tokens(dtype: torch.dtype, sums: Sums) -> int:
    return FASTER_HALVES if dtype == torch.bfloat16 else FASTER_TOKENS.get(sums.block, FASTER_TOKENS_ELSE)


def turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight + bias` as `torch.addmm` gives it: what transformers' Conv1D is; likewise."""
    rows, columns = weight.shape
    if x.numel() == rows and weight.dtype == torch.float32 and order_of_columns(rows, columns) == 1:
        if weight.is_contiguous() and _is_one_float(x, weight.dtype, rows, bias):
            return multiply_turned(x, weight, bias, 1)  # eight rows at a time MKL is as fast
    return torch.addmm(bias, x.view(-1, rows), weight).view(*x.shape[:-1], columns)


def turned_rows(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The total, with some rows of a turned matrix added, as `turned` goes on behind those before.

    Where `knows_turned` says so. `x` has as many columns, in one token.
    """
    return multiply_turned(x, weight, total, order_of_columns(*weight.shape))


def knows_turned(dtype: torch.dtype, tokens: int, shape: tuple[int, int], step: int) -> bool:
    """Whether `turned_rows` of each `step` rows of a turned matrix gives the bits of torch's product with it all."""
    if dtype != torch.float32 or tokens != 1 or not can_multiply(dtype):
        return False
    at_once = order_of_columns(*shape)
    return bool(at_once) and not shape[0] % at_once and not step % at_once


def _order_for(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, whole_rows: int | None
) -> TokenOrder | None:
    """`order_of_token` for these operands, `whole_rows` as in `linear`; None where `multiply_token` is not for them."""
    rows, columns = weight.shape
    if not _is_one_float(x, weight.dtype, columns, bias):
        return None
    threads = torch.get_num_threads()
    if whole_rows is None and deals_out_rows(threads):
        return None
    even = rows if whole_rows is None else rows - rows % (QUAD_ROWS * threads)
    return order_of_token(even, columns, bias is not None, first_in_quad(weight))


def _is_one_float(x: torch.Tensor, dtype: torch.dtype, columns: int, bias: torch.Tensor | None) -> bool:
    """Whether this is one token of float32, for one of the native products."""
    return (
        dtype == torch.float32
        and x.numel() == columns == x.shape[-1]
        and is_exact(x, torch.float32, bias)
        and can_multiply(torch.float32)
    )


def _sums_for(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], bias: torch.Tensor | None) -> Sums | None:
    """`order_of_sums` for these operands; None where the native product is not for them."""
    if x.shape[-1] != shape[1] or not is_exact(x, dtype, bias):
        return None
    return order_of_sums(dtype, math.prod(x.shape[:-1]), *shape, bias is not None, torch.get_num_threads())


def is_exact(x: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> bool:
    """Whether operands are of this type, and torch multiplies them as they are, tokens at once and bias first.

    Tokens that are not contiguous it multiplies sequence by sequence, or adds the bias to the product.
    """
    return (
        x.dtype == dtype
        and x.is_contiguous()
        and not x.requires_grad
        and (bias is None or bias.dtype == dtype)
        and not torch.is_autocast_enabled("cpu")
        and (dtype != torch.float32 or _FLOATS.fp32_precision in ("none", "ieee"))
    )
