"""The native module's products, over tensors: thin, and with no word on whether torch would give the same bits.

All of them run on torch's number of threads, without the interpreter lock, and take matrices as they lie in memory.
"""

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from hermes.checkpoint.decoder import native

__all__ = [
    "EIGHT", "QUAD_ROWS", "Ranges", "Sums", "TokenOrder", "can_multiply", "can_multiply_tiles", "first_in_quad",
    "multiply", "multiply_token", "multiply_turned", "operands", "settle_functions",
]  # fmt: skip

QUAD_ROWS = 4
"""One token of float32 goes through so many rows at a time, what is left over in another order."""
EIGHT = 8
"""Rows of a turned matrix that are added together, in one of the orders."""


class Sums(NamedTuple):
    """Of several tokens: a sum begins from nothing after each `block` columns, of float32 after each `part`, too.

    The sums of a part are added up before they are added to those of the parts before. Of bf16, two columns come at a
    time, or with `by_tiles` 32, in the order of the processor's matrix unit.
    """

    block: int
    part: int
    by_tiles: bool = False


TokenOrder = Literal["lanes", "quads"]
"""In 16 lanes, multiplied and added with one rounding, or in four, with two."""


@functools.cache
def settle_functions() -> None:
    """Have MKL choose its vector functions for this processor, by one thread.

    Where two threads are the first to call one at the same time, one of them may get a less exact one: tanh was off by
    5e-5 in half of GPT-2's first activations, in one of ten cold processes.
    """
    for function in (torch.tanh, torch.erf, torch.exp):
        function(torch.zeros(16))


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether there are products of this type on this processor."""
    if native() is None:
        return False
    if dtype == torch.float32:
        return bool(native().can_multiply_floats())
    return dtype == torch.bfloat16 and bool(native().can_multiply())


def can_multiply_tiles() -> bool:
    """Whether those of bf16 can be in the order of a matrix unit."""
    return can_multiply(torch.bfloat16) and bool(native().can_multiply_tiles())


class Ranges:
    """One input's products with ranges of a matrix's rows: they share the output and, of float32, the turned tokens.

    Attributes:
        x: the tokens; contiguous for `multiply` and `multiply_token`.
        output: of all rows.
    """

    def __init__(self, x: torch.Tensor, rows: int) -> None:
        self.x = x
        self.output = x.new_empty(*x.shape[:-1], rows)
        self._turned: torch.Tensor | None = None

    def put(self, begin: int, products: torch.Tensor) -> None:
        """Those with rows from `begin` on that somebody else has computed."""
        self.output[..., begin : begin + products.shape[-1]] = products

    def multiply(self, begin: int, weight: torch.Tensor, bias: torch.Tensor | None, sums: Sums) -> None:
        """Those with rows of float32 from `begin` on, whose bias this is."""
        tokens, is_turned = math.prod(self.x.shape[:-1]), self._turned is not None
        if self._turned is None:
            self._turned = torch.empty(native().float_scratch_bytes(tokens, self.x.shape[-1]), dtype=torch.uint8)
        native().multiply_floats(
            weight.data_ptr(), *weight.shape, x=self.x.data_ptr(), tokens=tokens,
            bias=0 if bias is None else bias.data_ptr(), block=sums.block, part=sums.part,
            y=self.output.data_ptr() + begin * self.output.element_size(), y_stride=self.output.shape[-1],
            scratch=self._turned.data_ptr(), turned=is_turned, threads=torch.get_num_threads(),
        )  # fmt: skip

    def multiply_token(self, begin: int, weight: torch.Tensor, bias: torch.Tensor | None, order: TokenOrder) -> None:
        """The same of one float32 token, in lanes; but what is left over of rows, behind some others, by torch."""
        rows, columns = weight.shape
        what = {
            "x": self.x.data_ptr(),
            "bias": 0 if bias is None else bias.data_ptr(),
            "y": self.output.data_ptr() + begin * self.output.element_size(),
            "threads": torch.get_num_threads(),
        }
        if order == "lanes":
            native().multiply_float_lanes(weight.data_ptr(), rows, columns, **what)
        else:
            native().multiply_float_token(weight.data_ptr(), rows, columns, head=4 - first_in_quad(weight), **what)
        if rest := rows % QUAD_ROWS:
            last = slice(-rest - QUAD_ROWS, None)
            products = functional.linear(self.x, weight[last], None if bias is None else bias[last])
            self.put(begin + rows - rest, products[..., -rest:])


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sums: Sums) -> torch.Tensor:
    """`x @ weight.T + bias` of contiguous tokens, summed in this order."""
    if weight.dtype == torch.float32:
        ranges = Ranges(x, weight.shape[0])
        ranges.multiply(0, weight, bias, sums)
        return ranges.output
    what, output = operands(x, weight.shape[0], bias, sums)
    native().multiply(weight.data_ptr(), *weight.shape, **what)
    return output


def operands(x: torch.Tensor, rows: int, bias: torch.Tensor | None, sums: Sums) -> tuple[dict[str, int], torch.Tensor]:
    """What the native module is told of tokens of bf16, contiguous and kept by the caller, and where products go."""
    output = x.new_empty(*x.shape[:-1], rows)
    return {
        "x": x.data_ptr(),
        "tokens": math.prod(x.shape[:-1]),
        "bias": 0 if bias is None else bias.data_ptr(),
        "block": sums.block,
        "by_tiles": sums.by_tiles,
        "y": output.data_ptr(),
        "y_stride": rows,
        "threads": torch.get_num_threads(),
    }, output


def multiply_token(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: TokenOrder) -> torch.Tensor:
    """`Ranges.multiply_token` of a whole matrix."""
    ranges = Ranges(x, weight.shape[0])
    ranges.multiply_token(0, weight, bias, order)
    return ranges.output


def multiply_turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, at_once: int) -> torch.Tensor:
    """`x @ weight + bias` of one contiguous float32 token, one row after the other added to the bias, or `EIGHT`."""
    output = x.new_empty(*x.shape[:-1], weight.shape[1])
    native().multiply_float_columns(
        weight.data_ptr(), *weight.shape, x=x.data_ptr(), bias=bias.data_ptr(), by_eight=at_once == EIGHT,
        y=output.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return output


def first_in_quad(weight: torch.Tensor) -> int:
    """Where its first row begins in 16 bytes, in numbers. MKL takes columns singly up to such a boundary."""
    return weight.data_ptr() // weight.element_size() % 4
