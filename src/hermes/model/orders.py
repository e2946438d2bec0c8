"""In which order torch's products sum, found out by trying: where the native module's have the same bits.

Of bf16 oneDNN sums pairs of columns in order, of float32 MKL column after column, and both from nothing again after
each so many. One token of float32 MKL sums in four lanes, or row after row where the matrix lies turned.
"""

import functools

import torch
from torch.nn import functional

from hermes.model.kernels import QUAD_ROWS, can_multiply, first_in_quad, multiply, multiply_token, multiply_turned

__all__ = ["FLOAT_TOKENS", "GROUP_ROWS", "MOST_TOKENS", "adds_like_torch", "summing_block", "sums_like_torch"]

MOST_TOKENS = 16
"""Of bf16; above, torch's own product and the unpacking before it are faster."""
FLOAT_TOKENS = range(4, 513)
"""Of float32; 2 or 3 are summed in an order of their own, and above, MKL is as fast but for a few per cent, which
trying takes again where batches are of ever other sizes."""
COLUMNS = 32
"""The native product of bf16 takes multiples of this."""
GROUP_ROWS = 16
"""And, of plain rows, of this."""
BLOCKS = (512, 1024, 256, 2048)
"""Columns after which kernels of bf16 were seen to begin a new sum, or might."""
FLOAT_BLOCKS = (192, 256, 320, 336, 384, 448, 512)
"""And kernels of float32."""
TRIED_BYTES = 2**20
"""Of a matrix to find the order of sums with."""


def summing_block(dtype: torch.dtype, tokens: int, rows: int, columns: int, has_bias: bool, threads: int) -> int:
    """After so many columns torch's product of this shape begins a new sum on this machine; 0 if in no known way.

    By trying, with at most `TRIED_BYTES` of rows: kernels deal rows out to threads, each of them summed alike. 0 too
    where the native module has no product for it, or a slower one.
    """
    if dtype == torch.float32:
        fits = tokens in FLOAT_TOKENS and columns > 0
    else:
        fits = 0 < tokens <= MOST_TOKENS and not columns % COLUMNS
    if not fits or not can_multiply(dtype):
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
    for block in (*BLOCKS, columns) if dtype == torch.bfloat16 else FLOAT_BLOCKS:
        if _have_same_bits(multiply(x, weight, bias, block)[:, :rows], expected):
            return block
    return 0


def sums_like_torch(rows: int, columns: int, has_bias: bool, quarter: int) -> bool:
    """Whether torch sums one float32 token as `multiply_token` does; rows begin so many numbers behind 16 bytes.

    By trying, like `summing_block`.
    """
    if rows < 2 * QUAD_ROWS or not columns or columns % QUAD_ROWS:
        return False
    tried = max(2 * QUAD_ROWS, TRIED_BYTES // (4 * columns)) // QUAD_ROWS * QUAD_ROWS + rows % QUAD_ROWS
    return _try_token(min(rows, tried), columns, has_bias, quarter, torch.get_num_threads())


@functools.cache
def _try_token(rows: int, columns: int, has_bias: bool, quarter: int, threads: int) -> bool:
    generator = torch.Generator().manual_seed(columns)
    memory = torch.empty(rows * columns + 2 * QUAD_ROWS)
    weight = memory[(quarter - first_in_quad(memory)) % 4 :][: rows * columns].view(rows, columns)
    weight.copy_(_distinct_rows(rows, columns, generator))
    x, bias = torch.randn(1, columns, generator=generator), torch.randn(rows, generator=generator)
    given = bias if has_bias else None
    return _have_same_bits(multiply_token(x, weight, given), functional.linear(x, weight, given))


def adds_like_torch(rows: int, columns: int) -> bool:
    """Whether `torch.addmm` of one float32 token adds row after row. By trying, with at most `TRIED_BYTES` of rows."""
    tried = min(rows, max(1, TRIED_BYTES // (4 * max(1, columns))))
    return bool(rows and columns) and _try_turned(tried, columns, torch.get_num_threads())


@functools.cache
def _try_turned(rows: int, columns: int, threads: int) -> bool:
    generator = torch.Generator().manual_seed(columns)
    weight = _distinct_rows(rows, columns, generator)
    x, bias = torch.randn(1, rows, generator=generator), torch.randn(columns, generator=generator)
    return _have_same_bits(multiply_turned(x, weight, bias), torch.addmm(bias, x, weight))


def _have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def _distinct_rows(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, each row those of the one before moved by one: made ten times as fast as all anew."""
    return torch.randn(rows + columns, generator=generator).unfold(0, columns, 1)[:rows].contiguous()
