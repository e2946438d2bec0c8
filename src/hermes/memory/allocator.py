"""The C library's heap, kept from hoarding: what torch frees between blocks must leave the process, or the budget pays.

Covers glibc only; elsewhere these functions say so by returning False. The arena for weights is in `arena`.
"""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["grow_heap", "hold_heap", "keep_heap_tight", "put_off_collections", "trim_heap"]

# Parameter numbers of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_NUM_ARENAS = 2
_THRESHOLD_BYTES = 1 << 24
_LARGEST_THRESHOLD_BYTES = 1 << 25
"""glibc takes no larger one for blocks of their own."""
_PROBE_BYTES = 1 << 17
"""From 64 KiB on, glibc looks at the end of the heap when they are freed."""

_trim_threshold = 1 << 17  # glibc's own
_threshold_lock = threading.Lock()


def keep_heap_tight() -> bool:
    """Make freed activations go back to the kernel at once; True if the allocator took every setting.

    Left alone, glibc keeps free what it likes, and gives every thread an arena of its own to keep it in. Blocks from
    16 MiB on now go back when they are freed, and free memory at the top of the heap when it comes to 16 MiB; smaller
    buffers are used again by the next block, because taking them anew would cost a page fault for each 4 KiB (an eighth
    of a pass of BERT-large). Call before threads start and before the first large buffer; again changes nothing.
    """
    return all([_set((_M_ARENA_MAX, _NUM_ARENAS)), _hold(_THRESHOLD_BYTES)])


def hold_heap(nbytes: int) -> bool:
    """Let freed activations stay in the process as far as `nbytes` are reserved for them; True if the allocator does.

    A large batch frees and takes buffers of 10 to 30 MiB at every operation: given back each time, they cost BERT-large
    a fifth of a pass over 2,000 tokens in page faults. Less than `keep_heap_tight` leaves is not asked for.
    """
    return nbytes <= _THRESHOLD_BYTES or _hold(min(nbytes, 2**31 - 1))


def grow_heap(nbytes: int) -> bool:
    """Have so many bytes of free heap there, zeroed, as far as `hold_heap` lets them stay; True if they are.

    The page faults of a first pass, taken while the disk fills the window: on a virtual machine, whose host must find
    each page, 10 microseconds each. Releases the interpreter lock.
    """
    return bool(nbytes) and _take_and_free(nbytes, touch=True)


def trim_heap() -> bool:
    """Give free heap pages back to the kernel; True if any were. Walks the whole heap (milliseconds): not per block.

    malloc_trim leaves the end of every thread's heap but the first one's. Of the calling thread's, that goes too: after
    CNNs were measured in a thread, 30 to 60 MiB.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    malloc_trim.argtypes = (ctypes.c_size_t,)
    malloc_trim.restype = ctypes.c_int
    with _threshold_lock:  # or another thread would put the threshold back before this one frees
        if _set((_M_TRIM_THRESHOLD, 0)):
            _take_and_free(_PROBE_BYTES, touch=False)
            _set((_M_TRIM_THRESHOLD, _trim_threshold))
    return bool(malloc_trim(0) == 1)


@contextmanager
def put_off_collections() -> Iterator[None]:
    """While inside, the garbage collector waits: what a load makes stays, and looking through it takes 0.1 s."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _hold(nbytes: int) -> bool:
    """Let so many free bytes stay at the end of each heap, and take blocks below that from heaps as far as may be."""
    global _trim_threshold
    with _threshold_lock:
        _trim_threshold = nbytes
        return _set((_M_MMAP_THRESHOLD, min(nbytes, _LARGEST_THRESHOLD_BYTES)), (_M_TRIM_THRESHOLD, nbytes))


def _take_and_free(nbytes: int, *, touch: bool) -> bool:
    """A block of the heap, zeroed if it is touched; True if there was one. Releases the interpreter lock."""
    try:
        libc = ctypes.CDLL(None)
        malloc, free = libc.malloc, libc.free
    except (AttributeError, OSError, TypeError):
        return False
    malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    free.argtypes = (ctypes.c_void_p,)
    if not (address := malloc(nbytes)):
        return False
    if touch:
        ctypes.memset(address, 0, nbytes)
    free(address)
    return True


def _set(*settings: tuple[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return all([mallopt(parameter, setting) == 1 for parameter, setting in settings])
