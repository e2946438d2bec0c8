"""How fast this machine's kernels are now, from a few matrices: for models that were profiled earlier, or never."""

import statistics
import time

import torch

from hermes.model.product import linear

__all__ = ["Calibration", "calibrate_compute", "measure_speed"]

ROWS, COLUMNS, NUM_MATRICES = 2048, 1024, 4
MANY_TOKENS = 128


class Calibration:
    """Seconds of a linear layer by its bytes, its operations and the tokens it sees."""

    def __init__(self, seconds_per_byte: float, seconds_per_flop: float) -> None:
        self.seconds_per_byte = seconds_per_byte
        self.seconds_per_flop = seconds_per_flop

    def seconds(self, nbytes: int, flops: float) -> float:
        """Reading the weights, or computing with them, whichever takes longer."""
        return max(nbytes * self.seconds_per_byte, flops * self.seconds_per_flop)


def calibrate_compute(dtype: torch.dtype, tokens: int) -> Calibration:
    """Time one linear layer for one token and for `tokens`; also brings the kernels' code into memory. About 50 ms."""
    with torch.no_grad():
        weights = _weights(dtype)
        nbytes, tokens = weights[0].nbytes, min(tokens, MANY_TOKENS)
        single, many = min(_seconds(1, weights)), min(_seconds(tokens, weights))
    return Calibration(single / nbytes, many / (2 * tokens * ROWS * COLUMNS))


def measure_speed(dtype: torch.dtype) -> float:
    """Operations a second of linear layers of many tokens, now: what other guests leave of the machine. Some 40 ms."""
    with torch.no_grad():
        seconds = statistics.median(_seconds(MANY_TOKENS, _weights(dtype)))
    return 2 * MANY_TOKENS * ROWS * COLUMNS / seconds


def _weights(dtype: torch.dtype) -> torch.Tensor:
    # More than a core's cache; one allocation, large enough to leave the process when it is freed.
    return torch.full((NUM_MATRICES, ROWS, COLUMNS), 0.01, dtype=dtype)


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
