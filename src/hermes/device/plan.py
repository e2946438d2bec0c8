"""What stays in a device's memory, and the window that the rest passes through: pure arithmetic over block sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from hermes.errors import BudgetError
from hermes.plan import spread
from hermes.units import format_budget, format_bytes

__all__ = ["SLOT_BYTES", "DevicePlan", "plan_device", "slot_offsets"]

SLOT_BYTES = 512
"""Tensors begin at multiples of this, as those do that torch allocates: kernels choose, and may round, by address."""
AHEAD = 2
"""Blocks in the window: one is computed while the next one comes."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """How a device's memory is used.

    Attributes:
        budget_bytes: what was allowed.
        stays: blocks whose weights are kept.
        staying_bytes: of them.
        pinned_bytes: of small weights that belong to no block.
        ring_bytes: the window.
        heap_bytes: activations, cache and scores.
        pass_bytes: copied to the device in each pass.
    """

    budget_bytes: int
    stays: frozenset[int]
    staying_bytes: int
    pinned_bytes: int
    ring_bytes: int
    heap_bytes: int
    pass_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Of all that is planned for."""
        return self.staying_bytes + self.pinned_bytes + self.ring_bytes + self.heap_bytes


def slot_offsets(loads: Sequence[int]) -> tuple[list[int], int]:
    """Where loads of so many bytes begin, one behind the other, and what they take in all."""
    offsets, end = [], 0
    for nbytes in loads:
        offsets.append(end)
        end += -(-nbytes // SLOT_BYTES) * SLOT_BYTES
    return offsets, end


def plan_device(
    blocks: Sequence[int], *, num_in_pass: int, pinned_bytes: int, heap_bytes: int, budget_bytes: int
) -> DevicePlan:
    """Keep as many bytes as fit beside a window of two of the largest blocks that pass through it, or of one.

    Where a few blocks are larger than the rest (a vocabulary's head), keeping those makes the window smaller, which
    may leave more than it costs: each number of largest blocks is tried. The others that stay are spread evenly over
    the pass, so that copies never come in a row.

    Args:
        blocks: bytes of each in the device's memory; from `num_in_pass` on, such as a pass does not touch.
        num_in_pass: blocks of a pass.
        pinned_bytes: of what always stays.
        heap_bytes: that are no weights.
        budget_bytes: for all of it.

    Raises BudgetError, with the smallest budget that works.
    """
    free_bytes = budget_bytes - pinned_bytes - heap_bytes
    total = sum(blocks)
    largest_first = sorted(range(num_in_pass), key=lambda block: -blocks[block])
    unused = max(blocks[num_in_pass:], default=0)

    def layout(ahead: int) -> tuple[int, int] | None:
        """Of all numbers of largest blocks that stay, the one that leaves most: bytes of window, number."""
        best: tuple[int, int] | None = None
        kept_bytes = 0
        for number, block in enumerate(largest_first):
            ring_bytes = max(ahead * blocks[block], unused)
            if kept_bytes + ring_bytes <= free_bytes and (best is None or ring_bytes < best[0]):
                best = ring_bytes, number
            kept_bytes += blocks[block]
        return best

    if total <= free_bytes:
        ring_bytes, stays = 0, frozenset(range(len(blocks)))
    else:
        found = layout(AHEAD) or layout(1)
        if found is None:
            least = pinned_bytes + heap_bytes + min(total, max(blocks))
            raise BudgetError(
                f"the device's budget of {format_bytes(budget_bytes)} is too small: {format_bytes(heap_bytes)} for "
                f"activations and cache, {format_bytes(pinned_bytes)} pinned, {format_bytes(max(blocks))} window; "
                f"try --device-budget {format_budget(least)}",
                minimum_bytes=least,
            )
        ring_bytes, number = found
        large = frozenset(largest_first[:number])
        left_bytes = free_bytes - ring_bytes - sum(blocks[block] for block in large)
        others = [[] if block in large else [blocks[block]] for block in range(num_in_pass)]
        stays = large | {block for block, kept in enumerate(spread(others, left_bytes)) if kept}
    staying_bytes = sum(blocks[block] for block in stays)
    return DevicePlan(
        budget_bytes=budget_bytes,
        stays=stays,
        staying_bytes=staying_bytes,
        pinned_bytes=pinned_bytes,
        ring_bytes=ring_bytes,
        heap_bytes=heap_bytes,
        pass_bytes=sum(blocks[block] for block in range(num_in_pass) if block not in stays),
    )
