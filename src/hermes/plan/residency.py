"""Which weights stay: the same share of every block, so that the disk never idles and the window never starves."""

from collections.abc import Sequence

__all__ = ["spread", "spread_over"]


def spread(blocks: Sequence[Sequence[int]], budget_bytes: int) -> list[frozenset[int]]:
    """For each block the loads to keep, of `budget_bytes` in all at most, spread evenly by error diffusion.

    `blocks` gives slot bytes per load, in the order of the pass. The share kept of any stretch of the pass differs from
    the share kept of the whole by less than one load. What is left over keeps whatever still fits, largest first.

    **Guarantee.** The loads kept sum to `budget_bytes` at most.
    """
    total = sum(sum(loads) for loads in blocks)
    if budget_bytes >= total:
        return [frozenset(range(len(loads))) for loads in blocks]
    kept: list[set[int]] = [set() for _ in blocks]
    left = budget_bytes
    owed = 0.0
    for block, loads in enumerate(blocks):
        for load, nbytes in enumerate(loads):
            owed += nbytes * budget_bytes / total
            if nbytes <= owed and nbytes <= left:
                kept[block].add(load)
                owed -= nbytes
                left -= nbytes
    rest = [
        (nbytes, block, load)
        for block, loads in enumerate(blocks)
        for load, nbytes in enumerate(loads)
        if load not in kept[block]
    ]
    for nbytes, block, load in sorted(rest, reverse=True):
        if nbytes <= left:
            kept[block].add(load)
            left -= nbytes
    return [frozenset(loads) for loads in kept]


def spread_over(chosen: Sequence[frozenset[int]], sizes: Sequence[Sequence[int]], nbytes: int) -> list[frozenset[int]]:
    """`spread` over the chosen loads of each block alone."""
    counted = [
        [size if load in loads else 0 for load, size in enumerate(block)]
        for loads, block in zip(chosen, sizes, strict=True)
    ]
    return [kept & loads for kept, loads in zip(spread(counted, nbytes), chosen, strict=True)]
