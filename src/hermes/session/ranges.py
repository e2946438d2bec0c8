"""Which matrices may stream in ranges of rows, and what memory it takes to put them together where they may not."""

from typing import Any, cast

import torch
from torch import nn

from hermes.model.mapping import is_plain_linear, is_turned_linear
from hermes.model.orders import deals_out_rows
from hermes.model.product import knows_rows, knows_turned, packed_step, slows_ranges
from hermes.model.trace import Trace
from hermes.model.units import MATRIX_ROWS, row_step
from hermes.session.workload import Workload

__all__ = ["can_cut", "knows_ranges", "matrix_bytes_of", "row_shares", "unpacked_bytes"]


def can_cut(skeleton: nn.Module, trace: Trace, workload: Workload, range_bytes: int) -> bool:
    """Whether larger matrices shall stream in such ranges: all passes round as with whole ones, but for a prompt's.

    And none computes for longer: where a pass has so many tokens, the disk is not what it waits for.
    """
    head = cast(Any, skeleton).get_output_embeddings()
    large = [
        (layer, workload.batch_size if workload.max_new_tokens else trace.tokens(name, _weight(layer).numel()))
        for name, layer in skeleton.named_modules()
        if (is_plain_linear(layer) or is_turned_linear(layer))
        and layer is not head
        and matrix_bytes_of(layer) > range_bytes
    ]
    return bool(large) and all(
        knows_ranges(layer, tokens, row_step(_weight(layer).shape, matrix_bytes_of(layer), range_bytes, MATRIX_ROWS))
        and not (is_plain_linear(layer) and slows_ranges(layer.weight.dtype, tokens, *_shape(layer)))
        for layer, tokens in large
        if tokens
    )


def knows_ranges(layer: nn.Module, tokens: int, step: int) -> bool:
    """Whether products of each `step` rows of a linear layer's matrix have the bits of the one with it all."""
    shape, has_bias = _shape(layer)
    if is_turned_linear(layer):
        return knows_turned(_weight(layer).dtype, tokens, shape, step)
    return knows_rows(_weight(layer).dtype, tokens, shape, step, has_bias)


def matrix_bytes_of(layer: nn.Module) -> int:
    """Of a linear layer's matrix."""
    return _weight(layer).numel() * _weight(layer).element_size()


def unpacked_bytes(layer: nn.Module, tokens: int, rows: tuple[int, int] | None) -> int:
    """Of a matrix that stays packed, or of some of its rows: what a product of so many tokens unpacks at a time."""
    linear = cast(nn.Linear, layer)
    begin, end = rows or (0, linear.out_features)
    step = packed_step((end - begin, linear.in_features), tokens, linear.bias is not None, linear.out_features)
    return step * linear.in_features * linear.weight.element_size()


def row_shares(dtype: str) -> int:
    """Of a vocabulary's rows, one for each of torch's threads where what it leaves over is summed otherwise."""
    threads = torch.get_num_threads()
    return threads if dtype == "float32" and deals_out_rows(threads) else 1


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer.weight)


def _shape(layer: nn.Module) -> tuple[tuple[int, int], bool]:
    """Of the matrix as it lies, and whether there is a bias."""
    rows, columns = _weight(layer).shape
    return (rows, columns), layer.bias is not None
