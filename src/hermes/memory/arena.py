"""Page-aligned memory for weights, outside every allocator: it is taken once, and given back at once."""

import mmap

__all__ = ["Arena"]


class Arena:
    """`nbytes` of anonymous memory, page-aligned, zero until touched; costs nothing until then.

    `view` is what readers write into and tensors are made over. The memory lives until `close` and until the last
    tensor or view over it is gone, so a kept alias never points at memory that belongs to somebody else.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 2**23:
            self._map.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults, and fewer pages to pin for each direct read
        self.view = memoryview(self._map)

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the whole pages inside the range back to the system; they read as zeros from now on."""
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Drop this handle; where tensors over the memory are alive, it goes when they go."""
        self.view = memoryview(b"")
