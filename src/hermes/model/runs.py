"""Tensors that know only where their elements lie, for finding out what transformers' conversions do with bytes."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Rearranged", "Runs"]


class Rearranged(Exception):
    """The elements do not stay in whole runs."""


class Runs:
    """A tensor of which only this is known: its shape, and from where its elements come, in row-major order.

    `runs` are (source tensor, first element, number of elements). Only operations that keep each source in one run per
    result are understood; every other one raises, so that nothing is ever read in strips of a few bytes.
    """

    def __init__(self, shape: Iterable[int], runs: Iterable[tuple[int, int, int]]) -> None:
        self.shape = torch.Size(shape)
        self.runs = tuple(runs)

    @classmethod
    def whole(cls, source: int, shape: Sequence[int]) -> "Runs":
        """All of source number `source`."""
        return cls(shape, [(source, 0, math.prod(shape))])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (understood := _UNDERSTOOD.get(func)) is None:
            raise Rearranged(f"{getattr(func, '__name__', func)} moves elements")
        return understood(*args, **(kwargs or {}))

    def contiguous(self) -> "Runs":
        """The same: runs are in row-major order by definition."""
        return self

    def lots(self, count: int) -> list[list[tuple[int, int, int]]]:
        """The runs in `count` equal lots; raises where that would cut a run."""
        size = math.prod(self.shape) // count
        lots, runs = [], iter(self.runs)
        for _ in range(count):
            lot, missing = [], size
            while missing > 0:
                lot.append(next(runs))
                missing -= lot[-1][2]
            if missing < 0:
                raise Rearranged("a source would be read in strips")
            lots.append(lot)
        return lots

    def between(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The runs of elements `begin` to `end`."""
        position = 0
        for source, first, length in self.runs:
            low, high = max(begin - position, 0), min(end - position, length)
            if low < high:
                yield source, first + low, high - low
            position += length


def _cat(tensors: Sequence[Runs], dim: int = 0) -> Runs:
    shape = list(tensors[0].shape)
    dim %= len(shape)
    for other in tensors:
        if [*other.shape[:dim], *other.shape[dim + 1 :]] != shape[:dim] + shape[dim + 1 :]:
            raise ValueError(f"shapes {shape} and {list(other.shape)} do not fit together along {dim}")
    lots = zip(*(tensor.lots(math.prod(shape[:dim])) for tensor in tensors), strict=True)
    runs = itertools.chain.from_iterable(itertools.chain.from_iterable(lots))
    return Runs([*shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *shape[dim + 1 :]], runs)


def _stack(tensors: Sequence[Runs], dim: int = 0) -> Runs:
    dim %= len(tensors[0].shape) + 1
    return _cat([Runs([*t.shape[:dim], 1, *t.shape[dim:]], t.runs) for t in tensors], dim)


def _split(tensor: Runs, sizes: int | Sequence[int], dim: int = 0) -> tuple[Runs, ...]:
    shape = list(tensor.shape)
    dim %= len(shape)
    if isinstance(sizes, int):
        sizes = [min(sizes, shape[dim] - begin) for begin in range(0, shape[dim], sizes)]
    if math.prod(shape[:dim]) != 1:
        raise Rearranged("a source would be read in strips")
    if sum(sizes) != shape[dim]:
        raise ValueError(f"{list(sizes)} are not {shape[dim]} together")
    inner = math.prod(shape[dim + 1 :])
    bounds = list(itertools.accumulate(sizes, initial=0))
    return tuple(
        Runs([*shape[:dim], end - begin, *shape[dim + 1 :]], tensor.between(begin * inner, end * inner))
        for begin, end in itertools.pairwise(bounds)
    )


def _chunk(tensor: Runs, chunks: int, dim: int = 0) -> tuple[Runs, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


_UNDERSTOOD: Mapping[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
}
