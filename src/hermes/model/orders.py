"""In which order torch's products sum, found out by trying: where the native module's have the same bits.

Of bf16 oneDNN sums pairs of columns in order, of float32 MKL column after column, and both from nothing again after
each so many; MKL may have threads share the columns too. One token of float32 MKL sums in lanes, or row after row where
the matrix lies turned, in ways that differ with the width of its vectors.
"""

import functools
import mmap

import torch
from torch.nn import functional

from hermes.model.kernels import (
    EIGHT,
    QUAD_ROWS,
    Sums,
    TokenOrder,
    can_multiply,
    can_multiply_tiles,
    first_in_quad,
    multiply,
    multiply_token,
    multiply_turned,
)

__all__ = [
    "FLOAT_TOKENS", "GROUP_ROWS", "MOST_TOKENS", "Sums", "deals_out_rows", "order_of_columns", "order_of_sums",
    "order_of_token", "rounds_in_ranges",
]  # fmt: skip

MOST_TOKENS = 16
"""Of bf16; above, torch's own product and the unpacking before it are faster."""
MOST_TILE_TOKENS = 256
"""The same where there is a matrix unit. The native product takes twice torch's time then, and as long as it would take
to put a matrix together that came in ranges."""
FLOAT_TOKENS = range(4, 513)
"""Of float32; 2 or 3 are summed in an order of their own, and above, MKL is as fast but for a few per cent, which
trying takes again where batches are of ever other sizes."""
COLUMNS = 32
"""The native product of bf16 takes multiples of this."""
GROUP_ROWS = 16
"""And, of plain rows, of this."""
BLOCKS = (512, 1024, 256, 2048)
"""Columns after which kernels of bf16 were seen to begin a new sum, or might."""
FLOAT_BLOCKS = (384, 192, 256, 320, 336, 448, 512)
"""And kernels of float32."""
TRIED_BYTES = 2**20
"""Of a matrix to find the order of sums with, where it is that of any number of rows."""
TRIED_ROWS = 8
"""At the beginning, at both sides of the middle and at the end, where threads may meet, of a matrix that is zero
elsewhere: MKL decides by the number of rows whether threads share columns, so the matrix has all of them."""
HUGE_BYTES = 2**26
"""Of such a matrix, from which on its pages are huge."""


def order_of_sums(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, has_bias: bool, threads: int
) -> Sums | None:
    """How torch's product of this shape sums on this machine; None if in no known way, or there is no product for it.

    By trying; of bf16 without a matrix unit with at most `TRIED_BYTES` of rows, which kernels there sum alike each.
    """
    if dtype == torch.float32:
        fits = tokens in FLOAT_TOKENS and columns > 0
    else:
        most = MOST_TILE_TOKENS if can_multiply_tiles() else MOST_TOKENS
        fits = 0 < tokens <= most and not columns % COLUMNS
    if not fits or not can_multiply(dtype):
        return None
    if dtype == torch.bfloat16 and not can_multiply_tiles():
        rows = min(rows, max(GROUP_ROWS, TRIED_BYTES // (dtype.itemsize * columns)))
    return _try_order(dtype, tokens, rows, columns, has_bias, threads)


@functools.cache
def _try_order(dtype: torch.dtype, tokens: int, rows: int, columns: int, has_bias: bool, threads: int) -> Sums | None:
    """Some milliseconds."""
    index = _ends_and_middle(0, rows)
    index = torch.cat([index, index[:1].expand(-len(index) % GROUP_ROWS)])
    x, weight, bias = _cancelling(tokens, rows, columns, index, dtype, has_bias)
    expected = functional.linear(x, weight, bias)[:, index]
    tried, bias = weight[index], None if bias is None else bias[index]
    few = slice(None, GROUP_ROWS)
    for sums in _float_sums(columns, threads) if dtype == torch.float32 else _half_sums(tokens, columns, threads):
        if all(_have_same_bits(multiply(x[some], tried, bias, sums), expected[some]) for some in (few, slice(None))):
            return sums
    return None


def _float_sums(columns: int, threads: int) -> list[Sums]:
    return [Sums(block, part) for part in _shares(columns, threads, 1) for block in FLOAT_BLOCKS]


def _half_sums(tokens: int, columns: int, threads: int) -> list[Sums]:
    pairs = [Sums(block, columns) for block in (*BLOCKS, columns)]
    if not can_multiply_tiles():
        return pairs
    # From 33 tokens on oneDNN has any multiple, by all of a product's shape.
    blocks = dict.fromkeys((*_shares(columns, threads, COLUMNS), *BLOCKS, *range(COLUMNS, columns, COLUMNS)))
    return [*(Sums(block, columns, by_tiles=True) for block in blocks), *(pairs if tokens <= MOST_TOKENS else ())]


def _shares(columns: int, threads: int, step: int) -> list[int]:
    """Of columns, one, two, four and so on of which threads may have each."""
    return [columns // 2**n for n in range(threads.bit_length()) if not columns % (2**n * step)]


@functools.cache
def rounds_in_ranges(tokens: int, rows: int, columns: int, step: int, has_bias: bool, threads: int) -> bool:
    """Whether torch's products of bf16 with each `step` rows of a matrix have the bits of the one with all its rows.

    By trying. Where oneDNN begins new sums may depend on the number of rows.
    """
    ranges = {(begin, min(begin + step, rows)) for begin in (0, rows // step // 2 * step, (rows - 1) // step * step)}
    places = [(begin, end, _ends_and_middle(begin, end)) for begin, end in sorted(ranges)]
    index = torch.cat([index for *_, index in places])
    x, weight, bias = _cancelling(tokens, rows, columns, index, torch.bfloat16, has_bias)
    expected = functional.linear(x, weight, bias)
    return all(
        _have_same_bits(
            functional.linear(x, weight[begin:end], None if bias is None else bias[begin:end])[:, index - begin],
            expected[:, index],
        )
        for begin, end, index in places
    )


def _ends_and_middle(begin: int, end: int) -> torch.Tensor:
    """Numbers of some rows of a range: at both ends, and at both sides of the middle."""
    middle = (begin + end) // 2
    parts = ((begin, begin + TRIED_ROWS), (middle - TRIED_ROWS, middle + TRIED_ROWS), (end - TRIED_ROWS, end))
    return torch.tensor(sorted({row for part in parts for row in range(*part) if begin <= row < end}))


def _zeros(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that takes none until it is written: what is only read is one page of the system's, again and again.

    A huge page where that would be asked for very often; each place that is written takes 2 MiB then.
    """
    nbytes = dtype.itemsize * rows * columns
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE if nbytes < HUGE_BYTES else mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


def _cancelling(
    tokens: int, rows: int, columns: int, index: torch.Tensor, dtype: torch.dtype, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, a matrix and a bias, so that products with these rows of it cancel all but entirely; others are zero.

    Every other order of sums shows: those of bf16 are exact in float32, and what is left is rounding alone, as large as
    the bias.
    """
    generator = torch.Generator().manual_seed(columns)
    half = columns // 2
    x = _distinct_rows(tokens, columns, generator).to(dtype)
    tried = (_distinct_rows(len(index), columns, generator) / 64).to(dtype)
    x[:, half : 2 * half] = x[:, :half].roll(7, dims=1)
    tried[:, half : 2 * half] = -tried[:, :half].roll(7, dims=1)
    weight = _zeros(rows, columns, dtype)
    weight[index] = tried
    bias = (torch.randn(rows, generator=generator) / 2**18).to(dtype) if has_bias else None
    return x, weight, bias


def order_of_token(rows: int, columns: int, has_bias: bool, quarter: int) -> TokenOrder | None:
    """How torch sums one float32 token, of the ways that `multiply_token` has; None if in none of them.

    By trying, like `order_of_sums`. Rows begin `quarter` numbers behind 16 bytes.
    """
    if rows < 2 * QUAD_ROWS or not columns:
        return None
    threads = torch.get_num_threads()
    tried = max(2 * QUAD_ROWS * threads, TRIED_BYTES // (4 * columns)) // (QUAD_ROWS * threads) * QUAD_ROWS * threads
    tried = min(rows, tried + rows % (QUAD_ROWS * threads))
    return _try_token(tried, columns, has_bias, quarter, threads)


@functools.cache
def _try_token(rows: int, columns: int, has_bias: bool, quarter: int, threads: int) -> TokenOrder | None:
    generator = torch.Generator().manual_seed(columns)
    memory = torch.empty(rows * columns + 2 * QUAD_ROWS)
    weight = memory[(quarter - first_in_quad(memory)) % 4 :][: rows * columns].view(rows, columns)
    weight.copy_(_distinct_rows(rows, columns, generator))
    x, bias = torch.randn(1, columns, generator=generator), torch.randn(rows, generator=generator)
    given = bias if has_bias else None
    expected = functional.linear(x, weight, given)
    orders: tuple[TokenOrder, ...] = ("lanes",) if columns % QUAD_ROWS else ("lanes", "quads")
    return next((order for order in orders if _have_same_bits(multiply_token(x, weight, given, order), expected)), None)


@functools.cache
def deals_out_rows(threads: int) -> bool:
    """Whether torch gives threads equal shares of one float32 token's rows, each of which is summed in "lanes".

    But for what is left over of four rows in a share, in which that differs from all rows in one. By trying.
    """
    if not can_multiply(torch.float32):
        return False
    generator = torch.Generator().manual_seed(threads)
    rows, columns = threads * 64 + 1, 1024
    weight = _distinct_rows(rows, columns, generator)
    x = torch.randn(1, columns, generator=generator)
    parts = [multiply_token(x, share, None, "lanes") for share in weight.split(-(-rows // threads))]
    return _have_same_bits(torch.cat(parts, dim=1), functional.linear(x, weight))


def order_of_columns(rows: int, columns: int) -> int:
    """How many rows `torch.addmm` of one float32 token adds at a time, of those that `multiply_turned` knows; or 0.

    By trying, with at most `TRIED_BYTES` of rows.
    """
    tried = min(rows, max(1, TRIED_BYTES // (4 * max(1, columns)) // EIGHT) * EIGHT)
    return _try_turned(tried, columns, torch.get_num_threads()) if rows and columns else 0


@functools.cache
def _try_turned(rows: int, columns: int, threads: int) -> int:
    generator = torch.Generator().manual_seed(columns)
    weight = _distinct_rows(rows, columns, generator)
    x, bias = torch.randn(1, rows, generator=generator), torch.randn(columns, generator=generator)
    expected = torch.addmm(bias, x, weight)
    for at_once in (1,) if rows % EIGHT else (EIGHT, 1):
        if _have_same_bits(multiply_turned(x, weight, bias, at_once), expected):
            return at_once
    return 0


def _have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def _distinct_rows(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, each row those of the one before moved by one: made ten times as fast as all anew."""
    return torch.randn(rows + columns, generator=generator).unfold(0, columns, 1)[:rows].contiguous()
