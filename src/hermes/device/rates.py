"""How fast a device is: its products, and copies to it. From a moment of trying, as the CPU's calibration."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from hermes.device.device import Device
from hermes.profile import Calibration

__all__ = ["Rates", "measure_rates"]

ROWS, COLUMNS, NUM_MATRICES = 2048, 1024, 2
MANY_TOKENS = 128
COPIED_BYTES = 16 * 2**20
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a device: seconds of its products, and bytes a second that copies from registered memory bring."""

    compute: Calibration
    copy_bytes_per_second: float


def measure_rates(device: Device, dtype: torch.dtype, tokens: int) -> Rates:
    """Time one linear layer for one token and for `tokens`, and a copy of 16 MiB. Well under a second.

    It takes no more than that of the device's memory at once.
    """
    tokens = min(tokens, MANY_TOKENS)
    with torch.no_grad():
        weights = torch.full((NUM_MATRICES, ROWS, COLUMNS), 0.01, dtype=dtype, device=device.device)
        for _ in range(2):  # kernels are loaded at their first use
            single, many = _products(device, 1, weights), _products(device, tokens, weights)
        matrix_bytes = weights[0].nbytes
        del weights
    host = device.host_memory(COPIED_BYTES)
    pair = device.empty(COPIED_BYTES), torch.frombuffer(host.view, dtype=torch.uint8)
    copies = [_seconds(device, functools.partial(device.copy_in, [pair], None)) for _ in range(REPEATS)]
    host.close()
    operations = 2 * tokens * ROWS * COLUMNS
    return Rates(
        compute=Calibration(
            seconds_per_byte=min(single) / matrix_bytes,
            seconds_per_flop=min(many) / operations,
            speed=operations / statistics.median(many),
        ),
        copy_bytes_per_second=COPIED_BYTES / min(copies),
    )


def _products(device: Device, tokens: int, weights: torch.Tensor) -> list[float]:
    x = torch.ones(tokens, COLUMNS, dtype=weights.dtype, device=device.device)
    return [_seconds(device, functools.partial(functional.linear, x, weight)) for weight in weights]


def _seconds(device: Device, action: Callable[[], object]) -> float:
    device.synchronize()
    start = time.perf_counter()
    action()
    device.synchronize()
    return time.perf_counter() - start
