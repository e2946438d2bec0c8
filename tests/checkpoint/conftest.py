"""Weight files small enough to make anew for each test, and a look into the page cache."""

import ctypes
import mmap
import os

import pytest
import torch


def _state_dict():
    generator = torch.Generator().manual_seed(2)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "embed.weight": random(37, 11),
        "layer.0.weight": random(129, 65, dtype=torch.bfloat16),
        "layer.0.bias": random(129, dtype=torch.float16),
        "layer.1.weight": random(7, 3, 5, dtype=torch.float64),
        "position_ids": torch.arange(512).reshape(1, 512),
        "mask": torch.tensor([True, False, True]),
        "small": torch.arange(5, dtype=torch.int8),
        "packed": torch.arange(9, dtype=torch.uint8),
        "eighths": random(6).to(torch.float8_e4m3fn),
        "scale": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def state_dict():
    """Many dtypes, odd sizes (nothing ends on a block), a scalar, and an empty tensor."""
    return _state_dict()


@pytest.fixture
def raw():
    """The bytes of a tensor's values in order."""
    return lambda tensor: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def cached_pages():
    """Counts the pages of a file that are in the page cache, with mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        pytest.skip("no mincore here")

    def count(path):
        # Private and writable, because ctypes takes the address of writable memory only.
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            found = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
            view = ctypes.c_char.from_buffer(memory)
            failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(memory)), found)
            del view
            assert not failed
            return sum(page & 1 for page in found)

    return count


@pytest.fixture
def evicted(cached_pages):
    """Writes a file back and out of the page cache; skips where a file system keeps it there (tmpfs)."""

    def evict(path):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        if cached_pages(path):
            pytest.skip("this file system keeps files in memory")

    return evict
