"""What the planner is given (`Problem`) and what it settles (`Plan`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["TOUCH_STEP_BYTES", "Bandwidth", "Plan", "Problem", "UnitCost"]

TOUCH_STEP_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """One unit, as the planner sees it: bytes of each of its loads, and seconds of computing it.

    `first_seconds` is for the first pass (a prompt, a batch of texts), `next_seconds` for each later one (one token).
    `unpack_seconds` are those that one core takes to unpack each load; none where nothing is packed.
    """

    name: str
    slot_bytes: tuple[int, ...]
    read_bytes: tuple[int, ...]
    first_seconds: float
    next_seconds: float
    unpack_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """Direct reads from the checkpoint's disk by so many agents in pieces of this size."""

    num_agents: int
    piece_bytes: int
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, a machine and a workload.

    Attributes:
        units: in the order of a pass; only the first `num_in_pass` belong to it, the others must merely fit.
        groups: for each granularity, blocks as lists of unit numbers.
        bandwidths: what was measured; never empty.
        floor_bytes: the process before any weight.
        heap_bytes: activations, key-value cache and row buffers of the workload.
        pinned_bytes: weights that always stay.
        buffer_bytes: of each Loading Agent.
        num_passes: of the workload; the first is cold.
        preparing_bytes: that it took to pose the problem: no smaller budget is recommended.
        touch_seconds_per_byte: what it costs to write to memory for the first time, for each further `TOUCH_STEP_BYTES`
            that the process takes; the last one holds for what comes after. On a virtual machine that can be
            more than reading the same bytes from disk, so that a single pass is fastest with little memory.
        num_cores: that Loading Agents unpack on, at most one each.
        quiet: part of the units' `next_seconds` that they take where no weights stream.
        boundary_seconds: that each block of a pass takes besides its units' seconds.
        cold_seconds: that the first pass computes longer than the units' `first_seconds`.
        unpacking_slows_compute: False where the seconds of units were measured while agents unpacked what they read;
            unpacking what stays packed always does.
        windows: sizes of windows, smallest first, and how many times its rate the disk fills each of them with; none:
            all alike.
    """

    units: Sequence[UnitCost]
    num_in_pass: int
    groups: Mapping[str, Sequence[Sequence[int]]]
    bandwidths: Sequence[Bandwidth]
    floor_bytes: int
    heap_bytes: int
    pinned_bytes: int
    buffer_bytes: int
    num_passes: int
    preparing_bytes: int = 0
    touch_seconds_per_byte: Sequence[float] = ()
    num_cores: int = 1
    quiet: float = 1.0
    boundary_seconds: float = 0.0
    cold_seconds: float = 0.0
    unpacking_slows_compute: bool = True
    windows: Sequence[tuple[int, float]] = ()

    def rate_into(self, ring_bytes: int, bytes_per_second: float) -> float:
        """Of a disk with this rate, into a window of so many bytes: linear between those that were measured."""
        if not self.windows:
            return bytes_per_second
        sizes, shares = zip(*self.windows, strict=True)
        return bytes_per_second * float(np.interp(ring_bytes, sizes, shares))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run a model inside a budget, and what that is predicted to cost.

    Attributes:
        budget_bytes: what was asked.
        limit_bytes: the budget or the cgroup's limit, the tighter one; a margin below it is not planned with.
        granularity: "leaf", "joined", "half" or "layer".
        num_agents: Loading Agents.
        piece_bytes: size of one read.
        ring_bytes: the window.
        resident: for each block, the loads that stay in memory.
        resident_bytes: their sum.
        packed: for each block, the loads that stay as they lie on disk, packed; none where this is empty.
        packed_bytes: their sum, packed.
        pass_bytes: read from disk in a steady pass.
        first_pass_seconds: the cold pass.
        steady_pass_seconds: each later one.
        total_seconds: of the whole workload.
        peak_bytes: of the process.
        floor_bytes, heap_bytes, pinned_bytes: as in the problem.
        bound: "disk" or "compute", whichever limits a steady pass.
        bound_seconds: what that bound alone would take.
    """

    budget_bytes: int
    limit_bytes: int
    granularity: str
    num_agents: int
    piece_bytes: int
    ring_bytes: int
    resident: tuple[frozenset[int], ...]
    resident_bytes: int
    pass_bytes: int
    first_pass_seconds: float
    steady_pass_seconds: float
    total_seconds: float
    peak_bytes: int
    floor_bytes: int
    heap_bytes: int
    pinned_bytes: int
    bound: str
    bound_seconds: float
    sequential: bool = False
    packed: tuple[frozenset[int], ...] = ()
    packed_bytes: int = 0
