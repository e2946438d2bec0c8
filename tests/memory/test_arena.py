"""Memory that costs nothing until touched, goes back when asked, and outlives nobody who looks at it."""

import ctypes
import gc
import mmap
import sys

import pytest

from hermes.memory.arena import Arena

LIBC = ctypes.CDLL(None)
MIB = 2**20
PAGE = mmap.PAGESIZE
SLACK = 3 * MIB
"""A huge page more or less, where the kernel gives some."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and MADV_DONTNEED")


def resident_bytes(address, nbytes):
    """Memory behind these addresses. Not the whole process's, in which other tests' threads and garbage come and go."""
    pages = (ctypes.c_ubyte * (nbytes // PAGE))()
    mapped = LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages) == 0
    return sum(page & 1 for page in pages) * PAGE if mapped else 0


def address_of(arena):
    return ctypes.addressof(ctypes.c_char.from_buffer(arena.view))


def fill(arena, byte):
    ctypes.memset(address_of(arena), byte, arena.nbytes)


@linux
def test_memory_is_taken_when_touched_and_given_back_when_discarded():
    arena = Arena(64 * MIB)
    where = address_of(arena), 64 * MIB
    assert resident_bytes(*where) < SLACK
    fill(arena, 0xAB)
    assert abs(resident_bytes(*where) - 64 * MIB) < SLACK
    arena.discard(16 * MIB, 32 * MIB)
    assert abs(resident_bytes(*where) - 32 * MIB) < SLACK
    assert arena.view[16 * MIB - 1] == 0xAB
    assert arena.view[16 * MIB] == arena.view[48 * MIB - 1] == 0
    assert arena.view[48 * MIB] == 0xAB
    arena.view[16 * MIB] = 7  # usable again
    assert arena.view[16 * MIB] == 7
    arena.close()
    del arena
    assert resident_bytes(*where) < SLACK


@linux
def test_only_whole_pages_inside_the_range_are_discarded():
    arena = Arena(8 * PAGE)
    fill(arena, 0xAB)
    arena.discard(1, 3 * PAGE)
    assert [arena.view[n * PAGE] for n in range(8)] == [0xAB, 0, 0, 0xAB, 0xAB, 0xAB, 0xAB, 0xAB]
    assert arena.view[3 * PAGE - 1] == 0
    arena.discard(4 * PAGE + 1, PAGE)  # holds no whole page
    arena.discard(5 * PAGE, 0)
    assert bytes(arena.view[3 * PAGE :]) == b"\xab" * 5 * PAGE


def test_a_kept_alias_survives_close():
    arena = Arena(2 * PAGE)
    fill(arena, 0xAB)
    alias = arena.view[PAGE : PAGE + 4]
    arena.close()
    arena.close()
    assert len(arena.view) == 0
    del arena
    gc.collect()
    other = Arena(2 * PAGE)
    fill(other, 0xCD)
    assert bytes(alias) == b"\xab" * 4
    alias[0] = 1
    assert bytes(alias) == b"\x01\xab\xab\xab"


@pytest.mark.parametrize("begin", [None, 2 * PAGE])
def test_a_reference_lives_as_long_as_the_memory(begin):
    arena = Arena(4 * PAGE)
    if begin is not None:
        arena = arena.part(begin, PAGE)
    memory, alias = arena.reference(), arena.view[:4]
    arena.close()
    gc.collect()
    assert memory() is not None
    del alias
    assert memory() is None


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, PAGE + 1, 9 * MIB])
def test_every_size_is_page_aligned_and_zero(nbytes):
    arena = Arena(nbytes)
    assert len(arena.view) >= nbytes
    assert address_of(arena) % PAGE == 0
    assert bytes(arena.view[:PAGE]) == bytes(min(PAGE, len(arena.view)))
    arena.close()
