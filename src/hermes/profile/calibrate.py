"""How fast this machine's kernels are, from one small matrix: for models that were never profiled."""

import time

import torch

from hermes.model.product import linear

__all__ = ["Calibration", "calibrate_compute"]

ROWS, COLUMNS, NUM_MATRICES = 2048, 1024, 4


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
        # More than a core's cache; one allocation, large enough to leave the process when it is freed.
        weights = torch.full((NUM_MATRICES, ROWS, COLUMNS), 0.01, dtype=dtype)
        nbytes = weights[0].numel() * weights[0].element_size()
        single = _best(torch.ones(1, COLUMNS, dtype=dtype), weights)
        many = _best(torch.ones(min(tokens, 128), COLUMNS, dtype=dtype), weights)
    return Calibration(single / nbytes, many / (2 * min(tokens, 128) * ROWS * COLUMNS))


def _best(rows: torch.Tensor, weights: torch.Tensor) -> float:
    samples = []
    linear(rows, weights[0], None)  # tries in which order torch sums
    for weight in weights:
        start = time.perf_counter()
        linear(rows, weight, None)
        samples.append(time.perf_counter() - start)
    return min(samples)
