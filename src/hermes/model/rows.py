"""Embeddings by row: those that are looked up are read, and kept as far as there is room for the next lookups."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from hermes.memory.arena import Arena
from hermes.model.blocks import LoadFactory
from hermes.pipeload import Load

__all__ = ["KEPT_BYTES", "READ_BYTES", "RowTable", "runs_of"]

READ_BYTES = 4 * 2**20
"""Memory that rows are read into, before they are put where they belong."""
KEPT_BYTES = 4 * 2**20
"""Of rows of an embedding, to be looked up again: most texts use the same few thousand words."""
APART_BYTES = 32 * 2**10
"""Rows with no more than this between them are read together: that costs less than a read more, from 250 MB/s on."""


class RowTable:
    """One embedding. Not for several threads at once.

    Args:
        embedding: the module, whose weight is nowhere in memory.
        name: what messages call its weight.
        factory: makes the loads of rows.
        fetch: reads loads into the given memory, blocking; the engine's.
        copy: puts rows (sorted, distinct) into the given ones, where the matrix is in memory for another module's sake;
            else False. None: nothing else has it.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        name: str,
        factory: LoadFactory,
        fetch: Callable[[Sequence[tuple[Load, memoryview]]], None],
        copy: Callable[[Sequence[int], torch.Tensor], bool] | None,
    ) -> None:
        self._name = name
        self._num_rows = embedding.num_embeddings
        self._weight = factory.canonical(name)
        self._factory = factory
        self._fetch = fetch
        self._copy = copy
        self._row_bytes = factory.empty_rows(self._weight, 1).nbytes
        room = min(self._num_rows, KEPT_BYTES // max(1, self._row_bytes))
        self._kept = factory.empty_rows(self._weight, room)  # takes memory as it is filled
        self._place_of = torch.full((self._num_rows,), -1, dtype=torch.int32)
        self._num_kept = 0

    def embed(self, input: torch.Tensor) -> torch.Tensor:
        """`functional.embedding` of these rows; blocks while some are read. Raises IndexError and what `fetch` does."""
        if not input.numel():
            return functional.embedding(input, self._kept)
        low, high = (int(bound) for bound in torch.aminmax(input))
        if not 0 <= low <= high < self._num_rows:
            raise IndexError(f"{self._name}: index {high} is outside its {self._num_rows} rows")
        places = self._place_of[input]
        missing = torch.unique(input[places < 0])
        if not missing.numel():
            return functional.embedding(places, self._kept)
        if len(self._kept) == self._num_rows:  # of positions each token looks the next one up: all in one read
            missing = torch.arange(self._num_rows)
        if self._num_kept + missing.numel() > len(self._kept):  # those of long ago make room
            missing, places = torch.unique(input, return_inverse=True)
            self._place_of.fill_(-1)
            self._num_kept = 0
        if missing.numel() > len(self._kept):
            rows = self._factory.empty_rows(self._weight, missing.numel())
            self._read(missing.tolist(), rows)
            return functional.embedding(places, rows)
        end = self._num_kept + missing.numel()
        self._read(missing.tolist(), self._kept[self._num_kept : end])
        self._place_of[missing] = torch.arange(self._num_kept, end, dtype=torch.int32)
        self._num_kept = end
        return functional.embedding(self._place_of[input], self._kept)

    def _read(self, rows: Sequence[int], wanted: torch.Tensor) -> None:
        """The given rows (sorted, distinct) in order; those near each other come in one read."""
        if not wanted.numel() or (self._copy is not None and self._copy(rows, wanted)):
            return
        row_bytes = self._row_bytes
        wanted = wanted.view(torch.uint8).view(len(rows), -1)
        runs = runs_of(rows, apart=APART_BYTES // row_bytes, most=max(1, READ_BYTES // row_bytes))
        buffer: Arena | None = None
        while runs:
            loads: list[tuple[Load, int, range]] = []  # load, its slot, which of the wanted rows it brings
            used = 0
            while runs and (used < READ_BYTES or not loads):
                run = runs.popleft()
                load = self._factory.rows(self._weight, rows[run[0]], rows[run[-1]] + 1)
                loads.append((load, used, run))
                used += load.slot_bytes
            if buffer is None or buffer.nbytes < used:
                buffer = Arena(used)
            self._fetch([(load, buffer.view[slot : slot + load.slot_bytes]) for load, slot, _ in loads])
            flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
            for load, slot, run in loads:
                begin = slot + load.data_offset
                read = flat[begin : begin + load.nbytes].view(-1, row_bytes)
                places = torch.tensor([rows[index] - rows[run[0]] for index in run])
                torch.index_select(read, 0, places, out=wanted[run[0] : run[-1] + 1])


def runs_of(rows: Sequence[int], *, apart: int, most: int) -> deque[range]:
    """Indices of rows (sorted, distinct) in runs: so many at most between two rows, and no more from first to last."""
    runs: deque[range] = deque()
    for index, row in enumerate(rows):
        first = rows[runs[-1][0]] if runs else row
        if runs and row - rows[index - 1] - 1 <= apart and row - first < most:
            runs[-1] = range(runs[-1][0], index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
