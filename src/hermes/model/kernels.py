"""What this machine's kernels ask of weights in memory."""

import functools

import torch
from torch.nn import functional

__all__ = ["address_alignment"]

CACHE_LINE_BYTES = 64
"""What torch's own allocator aligns to, and so what a resident model has."""


@functools.cache
def address_alignment() -> int:
    """The coarsest alignment in memory, up to a cache line, that changes the bits of a product; 16 at the least.

    Tried, because it is nowhere promised: MKL's fp32 matrix-vector product, for one, rounds differently on some CPUs
    when the matrix begins at an odd multiple of 8 bytes, which is where half of all safetensors files have it. Takes
    about 2 ms, once.
    """
    generator = torch.Generator().manual_seed(0)
    needed = 16
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for rows, columns in ((96, 32), (1000, 64), (384, 384)):
                weight = torch.randn(rows, columns, generator=generator).to(dtype)
                for tokens in (1, 5, 16):
                    x = torch.randn(tokens, columns, generator=generator).to(dtype)
                    expected = functional.linear(x, _at(weight, 0))
                    for offset in (16, 32):
                        if not torch.equal(functional.linear(x, _at(weight, offset)), expected):
                            needed = max(needed, 2 * offset)
    return needed


def _at(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins `offset` bytes past a cache line."""
    nbytes = tensor.numel() * tensor.element_size()
    memory = torch.empty(nbytes + 2 * CACHE_LINE_BYTES, dtype=torch.uint8)
    begin = -memory.data_ptr() % CACHE_LINE_BYTES + offset
    copy = memory[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy
