"""The C library's heap: what is free in it goes back when that is asked for, of threads' heaps too."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from hermes.memory.allocator import grow_heap, hold_heap, keep_heap_tight, trim_heap
from hermes.memory.probe import resident_bytes

MIB = 2**20
NUM_THREADS = 4
"""Some of which have a heap that is not the first one's."""


@pytest.fixture
def held_heap():
    if not (keep_heap_tight() and hold_heap(512 * MIB)):
        pytest.skip("not glibc")
    yield
    keep_heap_tight()


def test_what_threads_have_freed_goes_back(held_heap):
    """The end of each heap too, where malloc_trim does not look."""
    barrier = Barrier(NUM_THREADS)

    def use_heap(_: int) -> None:
        barrier.wait()
        grow_heap(10 * MIB)

    def trim(_: int) -> None:
        barrier.wait()
        trim_heap()

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(trim, range(NUM_THREADS)))
        before = resident_bytes()
        list(threads.map(use_heap, range(NUM_THREADS)))
        assert resident_bytes() > before + 9 * MIB  # held
        list(threads.map(trim, range(NUM_THREADS)))
        assert resident_bytes() < before + 4 * MIB
