"""Page-aligned memory for weights, outside every allocator: it is taken once, and given back at once."""

import ctypes
import mmap
import weakref

__all__ = ["Arena"]

HUGE_PAGE_BYTES = 2 * 2**20


class Arena:
    """`nbytes` of anonymous memory, page-aligned, zero until touched; costs nothing until then.

    From 2 MiB on it begins at a huge page and asks for huge pages: a direct read then pins a few pages instead of
    thousands, which more than doubles the rate of one reader and costs a tenth of its processor time.

    `view` is what readers write into and tensors are made over. The memory lives until `close` and until the last
    tensor or view over it is gone, so a kept alias never points at memory that belongs to somebody else.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        huge = nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
        size = max(nbytes, mmap.PAGESIZE) + (HUGE_PAGE_BYTES if huge else 0)
        self._map: mmap.mmap | None = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            # A child (`trace_apart`) never looks at weights. Shared with it, each page that an agent writes meanwhile
            # would be copied first, and a direct read under way could end in the child's copy.
            self._map.madvise(mmap.MADV_DONTFORK)
        self._begin = 0
        if huge:
            self._map.madvise(mmap.MADV_HUGEPAGE)
            self._begin = -ctypes.addressof(ctypes.c_char.from_buffer(self._map)) % HUGE_PAGE_BYTES
        self.view = memoryview(self._map)[self._begin : self._begin + max(nbytes, mmap.PAGESIZE)]

    def part(self, offset: int, nbytes: int) -> "Arena":
        """A range as an arena of its own, whose handle is dropped apart; `offset` is a multiple of a page."""
        part = Arena.__new__(Arena)
        part.nbytes, part._map, part._begin = nbytes, self._map, self._begin + offset
        part.view = self.view[offset : offset + max(nbytes, mmap.PAGESIZE)]
        return part

    def touch(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Have every page there, zeroed, or those of a range; lets other threads run meanwhile."""
        length = self.nbytes - offset if nbytes is None else nbytes
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self.view)) + offset, 0, length)

    def keep_apart(self, offset: int, nbytes: int) -> None:
        """Let a range share no huge page with what lies beside it: touching it would bring that along."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.view)) + offset
        head = min(nbytes, -address % HUGE_PAGE_BYTES)
        tail = min(nbytes - head, (address + nbytes) % HUGE_PAGE_BYTES)
        for begin, length in ((offset, head), (offset + nbytes - tail, tail)):
            into = (self._begin + begin) % mmap.PAGESIZE
            if self._map is not None and length and hasattr(mmap, "MADV_NOHUGEPAGE"):
                self._map.madvise(mmap.MADV_NOHUGEPAGE, self._begin + begin - into, length + into)

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the whole pages inside the range back to the system; they read as zeros from now on."""
        begin = -(-(self._begin + offset) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._begin + offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def reference(self) -> "weakref.ref[object]":
        """Dead once the memory is gone. Of an arena that is not closed."""
        return weakref.ref(self.view.obj)

    def close(self) -> None:
        """Drop this handle; where tensors over the memory are alive, it goes when they go."""
        self.view = memoryview(b"")
        self._map = None
