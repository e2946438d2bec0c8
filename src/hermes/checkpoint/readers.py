"""Bytes from weight files into memory the caller owns: direct where the file system allows it, buffered otherwise.

Nothing read through here stays in the page cache: direct reads never enter it, buffered ones are dropped behind
themselves. What the bytes mean is in `index`; who reads what, and when, is the engine's choice.
"""

import contextlib
import errno
import mmap
import os
from types import TracebackType

from hermes.checkpoint.index import Checkpoint, Extent, FileStamp
from hermes.errors import ReadError

__all__ = ["Reader", "forget", "open_reader", "stop_readahead"]

#: Tried in this order; 4096 serves every disk with logical blocks of 512 or 4096 bytes.
_ALIGNMENTS = (4096, 8192, 16384, 32768, 65536)
_PAGE = mmap.PAGESIZE


class Reader:
    """One open descriptor per file of a checkpoint; `with` closes them.

    Reads are positional, so any number of threads may read at once. `close` only after they have stopped: a descriptor
    number that is closed under a read may by then belong to another file.
    """

    def __init__(self, files: tuple[FileStamp, ...], fds: tuple[int, ...], alignment: int) -> None:
        self._files = files
        self._fds = fds
        self.alignment = alignment
        """Offset, length and address of every target must be multiples of this many bytes (1: anything goes)."""

    @property
    def direct(self) -> bool:
        """True when reads go past the page cache."""
        return self.alignment > 1

    def read_into(self, file: int, offset: int, target: memoryview, required: int) -> int:
        """Fill `target` (of bytes) from `offset`, or up to the end of the file; the number of bytes read.

        Blocks, without the interpreter lock. `target` may reach past the end of the file, as an aligned superset
        does; at least `required` bytes must arrive. Raises ReadError when they do not, or when the disk fails.
        """
        fd, stamp = self._fd(file), self._files[file]
        done = 0
        try:
            while done < len(target) and offset + done < stamp.nbytes:
                # A direct read may stop anywhere but must start on a boundary: the last partial block is read again.
                start = done - done % self.alignment
                count = os.preadv(fd, [target[start:]], offset + start)
                if start + count <= done:
                    break
                done = start + count
        except OSError as error:
            raise ReadError(
                f"{stamp.path}: reading {len(target)} bytes at offset {offset} failed: {_reason(error)}; "
                "check the disk and the kernel log"
            ) from error
        finally:
            if not self.direct:
                forget(fd, offset, len(target))
        if done < required:
            raise ReadError(
                f"{stamp.path}: truncated while running: {done} of {required} bytes at offset {offset} "
                f"(the file had {stamp.nbytes}); restore it and run again"
            )
        return done

    def read_bytes(self, extent: Extent) -> bytes:
        """A small extent as bytes, whatever its alignment. Raises ReadError."""
        if extent.nbytes == 0:
            return b""
        skip = extent.offset % self.alignment
        needed = skip + extent.nbytes
        # An anonymous map starts on a page, which is what direct reads ask of an address. It is freed with its last
        # view rather than closed: the traceback of a failed read may still hold one.
        target = memoryview(mmap.mmap(-1, -(-needed // self.alignment) * self.alignment))
        self.read_into(extent.file, extent.offset - skip, target, needed)
        return bytes(target[skip:needed])

    def check(self) -> None:
        """Raise ReadError if a file changed, vanished or was replaced since the checkpoint was opened.

        Two stats a file, no reading: cheap enough for once a pass.
        """
        for number, stamp in enumerate(self._files):
            fd = self._fd(number)
            try:
                named, held = os.stat(stamp.path), os.fstat(fd)
            except FileNotFoundError as error:
                raise ReadError(f"{stamp.path}: vanished while in use; restore it and run again") from error
            except OSError as error:
                raise ReadError(f"{stamp.path}: no longer readable: {_reason(error)}") from error
            if named.st_ino != stamp.inode or (named.st_ino, named.st_dev) != (held.st_ino, held.st_dev):
                raise ReadError(f"{stamp.path}: was replaced by another file while in use; run again")
            if (held.st_size, held.st_mtime_ns) != (stamp.nbytes, stamp.mtime_ns):
                raise ReadError(
                    f"{stamp.path}: was written to while in use ({stamp.nbytes} bytes when opened, "
                    f"{held.st_size} now); run again"
                )

    def close(self) -> None:
        """Close every file; calling it again does nothing, reading afterwards raises ReadError."""
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _fd(self, file: int) -> int:
        fds = self._fds
        if len(fds) != len(self._files):
            raise ReadError(f"{self._files[file].path}: the reader is closed")
        return fds[file]


def open_reader(checkpoint: Checkpoint, *, direct: bool | None = None) -> Reader:
    """Open every file of the checkpoint, past the page cache when each of their file systems proves that it can.

    `direct=None` tries and falls back to buffered reads; True insists; False never tries. Raises ReadError when a file
    cannot be opened, is not the one the checkpoint was made from, or does not do what was insisted on.
    """
    files = checkpoint.files
    fds: list[int] = []
    alignment = 1
    if direct is not False:
        try:
            fds, alignment = _open_direct(files)
        except OSError as error:
            if direct:
                raise ReadError(f"{error.filename}: direct reads refused: {_reason(error)}; use direct=None") from error
    if not fds:
        try:
            fds = _open_each(files, 0)
        except OSError as error:
            raise ReadError(f"{error.filename}: cannot be opened: {_reason(error)}") from error
        for fd in fds:
            stop_readahead(fd)
    reader = Reader(files, tuple(fds), alignment)
    try:
        reader.check()
    except BaseException:
        reader.close()
        raise
    return reader


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Drop these bytes' pages from the page cache, where the system takes such advice (otherwise nothing happens)."""
    if hasattr(os, "posix_fadvise"):
        # The kernel keeps pages that are only partly inside the range, hence whole ones.
        start = offset - offset % _PAGE
        length = -(-(offset + nbytes - start) // _PAGE) * _PAGE
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def stop_readahead(fd: int) -> None:
    """Keep a buffered file from filling the page cache ahead of its reads: no readahead, or no caching (macOS)."""
    with contextlib.suppress(OSError, ImportError):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        else:
            import fcntl

            if (no_cache := getattr(fcntl, "F_NOCACHE", None)) is not None:
                fcntl.fcntl(fd, no_cache, 1)


def _open_each(files: tuple[FileStamp, ...], flags: int) -> list[int]:
    fds: list[int] = []
    try:
        for stamp in files:
            fds.append(os.open(stamp.path, os.O_RDONLY | flags))  # noqa: PERF401 - those already open must be closed
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _open_direct(files: tuple[FileStamp, ...]) -> tuple[list[int], int]:
    """Open past the page cache and prove it with one read on each file system; OSError where it does not work."""
    flag: int | None = getattr(os, "O_DIRECT", None)
    if flag is None:
        raise OSError(errno.ENOTSUP, "this system has no O_DIRECT", str(files[0].path) if files else None)
    fds = _open_each(files, flag)
    alignments: dict[int, int] = {}
    try:
        for fd, stamp in zip(fds, files, strict=True):
            device = os.fstat(fd).st_dev
            if device not in alignments:
                alignments[device] = _alignment(fd, stamp)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds, max(alignments.values(), default=_ALIGNMENTS[0])


def _alignment(fd: int, stamp: FileStamp) -> int:
    """Smallest alignment that a direct read of this file accepts; OSError when there is none."""
    refusal = OSError()
    for alignment in _ALIGNMENTS:
        with mmap.mmap(-1, alignment) as memory, memoryview(memory) as target:
            try:
                os.preadv(fd, [target], 0)
            except OSError as error:
                refusal = error
            else:
                return alignment
        if refusal.errno != errno.EINVAL:
            break
    raise OSError(refusal.errno, refusal.strerror, str(stamp.path))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
