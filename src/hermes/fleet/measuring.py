"""What a model costs in a fleet, by a few calls of it: seconds of its blocks, and memory besides weights."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from hermes.fleet.lanes import drop_kernel_threads
from hermes.fleet.members import Candidate
from hermes.memory.allocator import trim_heap
from hermes.memory.probe import resident_bytes
from hermes.model.blocks import LoadFactory
from hermes.session import HEAP_SLACK_BYTES, UNTRACED_HEAP_BYTES, Prepared, measure_calls

__all__ = ["SLACK_BYTES", "measure_candidate", "measuring_bytes"]

PIECE_BYTES = 8 * 2**20
SLACK_BYTES = 16 * 2**20
"""Of heap, besides what was measured: what lies between buffers, and grows within the millisecond."""
LOOK_SECONDS = 0.001
SCRATCH_SLOTS = 2
"""Copies of a block's weights that computing it is taken to need, in a kernel's own order, where nobody could look."""
WATCHED_CALL = 2
"""The first one fills the window, too."""
ROUNDS = 4


def measure_candidate(
    prepared: Prepared,
    call: Callable[[Any], object],
    *,
    limit_bytes: int,
    alone: bool,
    importance: float,
    deadline_seconds: float | None,
    resident_bytes: int | None,
) -> Candidate:
    """Call the model in a small window, unless a stored profile has its seconds.

    On a thread of its own, as it will run, with the only team of kernels' threads. `alone` says that nothing else
    computes in this process meanwhile: else what another model does would be taken for this one's. Blocking, for about
    as long as five calls and reading the weights for each take. Raises as `measure_calls` does, BudgetError where this
    process would outgrow `limit_bytes`.
    """
    heap = _Heap(call, alone)
    known = prepared.known
    if known is None:
        drop_kernel_threads()
        with ThreadPoolExecutor(1, thread_name_prefix="hermes-fleet-measure") as pool:
            known = pool.submit(measure_calls, prepared, heap, rounds=ROUNDS, limit_bytes=limit_bytes).result()
            pool.submit(trim_heap).result()  # of the heap that measuring threads share, or the floor would count it
    problem = prepared.problem(known, _factory_of(prepared), floor_bytes=0)
    activation_bytes = problem.heap_bytes - HEAP_SLACK_BYTES
    if prepared.known is not None:
        scratch_bytes = HEAP_SLACK_BYTES - SLACK_BYTES
    elif not heap.nbytes:
        scratch_bytes = SCRATCH_SLOTS * max((sum(unit.slot_bytes) for unit in problem.units), default=0)
    else:  # live tensors, which stay while others compute; holes and kernels' copies by looking, not by a factor
        if prepared.trace is not None:
            activation_bytes = min(activation_bytes, prepared.trace.peak_bytes)
        scratch_bytes = max(0, heap.nbytes - activation_bytes)
    return Candidate(
        problem=replace(problem, heap_bytes=0),
        activation_bytes=activation_bytes,
        scratch_bytes=scratch_bytes,
        importance=importance,
        deadline_seconds=deadline_seconds,
        resident_bytes=resident_bytes,
    )


def measuring_bytes(prepared: Prepared) -> int:
    """What measuring takes beside others: the smallest window twice, what is pinned, and computing."""
    factory = _factory_of(prepared)
    slots = [sum(load.slot_bytes for load in block.loads) for block in prepared.blocks(factory, "leaf")[0]]
    pinned = sum(load.slot_bytes for load in factory.pinned(prepared.partition.pinned).loads)
    activations = prepared.trace.peak_bytes if prepared.trace is not None else UNTRACED_HEAP_BYTES
    return (4 + SCRATCH_SLOTS) * max(slots, default=0) + pinned + activations


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


def _factory_of(prepared: Prepared) -> LoadFactory:
    """For plans: what the loads are, whatever the pieces."""
    with prepared.reader() as reader:
        return prepared.factory(reader.alignment, PIECE_BYTES)
