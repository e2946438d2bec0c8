"""How fast this machine's kernels are now, from a few matrices: for models that were profiled earlier, or never."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hermes.memory.arena import Arena
from hermes.model.product import linear

__all__ = ["Calibration", "calibrate_compute"]

ROWS, COLUMNS, NUM_MATRICES = 2048, 1024, 4
MANY_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds of a linear layer by its bytes, its operations and the tokens it sees.

    `speed` is in operations a second, of the tokens it was tried with: what other guests leave of the machine.
    """

    seconds_per_byte: float
    seconds_per_flop: float
    speed: float

    def seconds(self, nbytes: int, flops: float) -> float:
        """Reading the weights, or computing with them, whichever takes longer."""
        return max(nbytes * self.seconds_per_byte, flops * self.seconds_per_flop)


def calibrate_compute(dtype: torch.dtype, tokens: int, lend: Callable[[int], Arena] = Arena) -> Calibration:
    """Time one linear layer for one token and for `tokens`; also brings the kernels' code into memory. About 50 ms.

    The matrices lie in memory that `lend` gives for the time.
    """
    with torch.no_grad():
        # More than a core's cache.
        memory = lend(NUM_MATRICES * ROWS * COLUMNS * dtype.itemsize)
        weights = torch.frombuffer(memory.view, dtype=dtype).view(NUM_MATRICES, ROWS, COLUMNS).fill_(0.01)
        nbytes, tokens = weights[0].nbytes, min(tokens, MANY_TOKENS)
        single, many = _seconds(1, weights), _seconds(tokens, weights)
    operations = 2 * tokens * ROWS * COLUMNS
    return Calibration(
        seconds_per_byte=min(single) / nbytes,
        seconds_per_flop=min(many) / operations,
        speed=operations / statistics.median(many),
    )


def _seconds(tokens: int, weights: torch.Tensor) -> list[float]:
    """Of each product."""
    x = torch.ones(tokens, COLUMNS, dtype=weights.dtype)
    linear(x, weights[0], None)  # tries in which order torch sums
    samples = []
    for weight in weights:
        start = time.perf_counter()
        linear(x, weight, None)
        samples.append(time.perf_counter() - start)
    return samples
