"""What tests of devices have in common, for the simulated one and for a real GPU."""

import pytest
import torch

import hermes
from hermes.errors import BudgetError
from hermes.memory.probe import resident_bytes

MIB = 2**20


def load(path, kind="second", device_budget=None, **options):
    """A model on this kind of device, streamed from disk and planned for short texts unless told otherwise."""
    options = {"sequence_length": 8, "max_new_tokens": 8, "resident_bytes": 0} | options
    budget = resident_bytes() + 1200 * MIB
    return hermes.load(path, budget=budget, device=kind, device_budget=device_budget, **options)


def smallest(path, kind="second", **options):
    """The smallest device budget."""
    with pytest.raises(BudgetError, match="--device-budget") as refused:
        load(path, kind, 1, **options)
    return refused.value.minimum_bytes


def put(inputs, kind):
    return {name: value.to(kind) for name, value in inputs.items()}


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def memory(kind):
    """What of torch's, or of the simulated device's, counts memory: allocated now, and at its peak since `reset`."""
    if kind == "cuda":
        return torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    ops = torch.ops.second_device
    return ops.allocated_bytes, ops.peak_bytes, ops.reset_peak
