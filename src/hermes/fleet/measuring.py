"""What a model costs in a fleet, by a few calls of it: seconds of its blocks, and memory besides weights."""

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from hermes.errors import BudgetError
from hermes.fleet.lanes import drop_kernel_threads
from hermes.fleet.members import Candidate
from hermes.memory.allocator import trim_heap
from hermes.memory.probe import resident_bytes
from hermes.model.blocks import LoadFactory
from hermes.plan import Problem
from hermes.session import HEAP_SLACK_BYTES, Prepared, measure_calls

__all__ = ["PIECE_BYTES", "SCRATCH_SLOTS", "SLACK_BYTES", "factory_of", "measure_candidate", "measure_turn"]

PIECE_BYTES = 8 * 2**20
SLACK_BYTES = 16 * 2**20
"""Of heap, besides what was measured: what lies between buffers, and grows within the millisecond."""
LOOK_SECONDS = 0.001
SCRATCH_SLOTS = 2
"""Copies of a block's weights that computing it is taken to need, in a kernel's own order, where nobody could look."""
WATCHED_CALL = 2
"""The first one fills the window, too."""
ROUNDS = 4
CROWDED_ROUNDS = 2
TURNS = 24
TURN_PIXELS, TURN_WEIGHT = (1, 64, 56, 56), (64, 64, 3, 3)
"""A convolution of a millisecond or two."""
ELEMENTS = 2**20
"""Enough of them for a kernel on all cores."""


def measure_candidate(
    prepared: Prepared,
    call: Callable[[Any], object],
    *,
    limit_bytes: int,
    alone: bool,
    importance: float,
    deadline_seconds: float | None,
) -> Candidate:
    """Call the model in a small window, unless a stored profile has its seconds.

    On a thread of its own, as it will run, with the only team of kernels' threads; and once more beside another such
    thread, where there is room. `alone` says that nothing else computes in this process meanwhile: else what another
    model does would be taken for this one's. Blocking, for about as long as eight calls and reading the weights for
    each take. Raises as `measure_calls` does, BudgetError where this process would outgrow `limit_bytes`.
    """
    heap = _Heap(call, alone)
    crowding = 1.0
    known = prepared.known
    if known is None:
        drop_kernel_threads()
        with ThreadPoolExecutor(1, thread_name_prefix="hermes-fleet-measure") as pool:
            known = pool.submit(measure_calls, prepared, heap, rounds=ROUNDS, limit_bytes=limit_bytes).result()
            problem = prepared.problem(known, factory_of(prepared), floor_bytes=0)
            if alone:
                with (
                    suppress(BudgetError),  # there is no room for two teams: nor will there be in a run
                    ThreadPoolExecutor(1, thread_name_prefix="hermes-fleet-beside") as other,
                ):
                    other.submit(torch.ones(ELEMENTS).sum).result()
                    crowded = pool.submit(
                        measure_calls, prepared, call, rounds=CROWDED_ROUNDS, limit_bytes=limit_bytes
                    ).result()
                    again = prepared.problem(crowded, factory_of(prepared), floor_bytes=0)
                    crowding = max(1.0, _seconds(again) / _seconds(problem))
            pool.submit(trim_heap).result()  # of the heap that measuring threads share, or the floor would count it
    else:
        problem = prepared.problem(known, factory_of(prepared), floor_bytes=0)
    activation_bytes = problem.heap_bytes - HEAP_SLACK_BYTES
    scratch_bytes = max(0, heap.nbytes - activation_bytes)
    if prepared.known is not None:
        scratch_bytes = HEAP_SLACK_BYTES - SLACK_BYTES
    elif not heap.nbytes:
        scratch_bytes = SCRATCH_SLOTS * max((sum(unit.slot_bytes) for unit in problem.units), default=0)
    return Candidate(
        problem=replace(problem, heap_bytes=0),
        activation_bytes=activation_bytes,
        scratch_bytes=scratch_bytes,
        crowding=crowding,
        importance=importance,
        deadline_seconds=deadline_seconds,
    )


def measure_turn() -> float:
    """Seconds that a kernel takes longer on a thread that has just been handed the turn than on the one that had it.

    The system wakes the other team's threads where the last one's still are, and parts them after a while.
    """
    pixels, weight = torch.ones(TURN_PIXELS), torch.ones(TURN_WEIGHT)

    def kernel() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            torch.nn.functional.conv2d(pixels, weight, padding=1)
        return time.perf_counter() - start

    drop_kernel_threads()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        same, turns = (
            statistics.median([pool.submit(kernel).result() for _ in range(TURNS) for pool in pools][TURNS // 2 :])
            for pools in ((one, one), (one, other))
        )
    return max(0.0, turns - same)


def factory_of(prepared: Prepared) -> LoadFactory:
    """For plans: what the loads are, whatever the pieces."""
    with prepared.reader() as reader:
        return prepared.factory(reader.alignment, PIECE_BYTES)


def _seconds(problem: Problem) -> float:
    return max(1e-9, sum(unit.next_seconds for unit in problem.units))


class _Heap:
    """The call, one of which is looked at: the memory it takes, from a heap without free pages on."""

    def __init__(self, call: Callable[[Any], object], watched: bool) -> None:
        self.nbytes = 0
        self._call = call
        self._left = WATCHED_CALL if watched else 0

    def __call__(self, module: Any) -> object:
        self._left -= 1
        if self._left != 0:
            return self._call(module)
        trim_heap()
        before = resident_bytes()
        with _Peak() as peak:
            answer = self._call(module)
        self.nbytes = max(0, peak.nbytes - before)
        return answer


class _Peak:
    """The most that this process holds within the block, as far as looking every millisecond finds it."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hermes-fleet-peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.nbytes = max(self.nbytes, resident_bytes())
