"""Library code: pages that were needed once, while it was loaded, given back; those that a run needs, fetched at once.

Only Linux tells and takes such things; elsewhere nothing happens.
"""

import ctypes
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hermes.memory.allocator import trim_heap

__all__ = ["Code", "code_in_use", "drop_idle_pages", "drop_read_around", "fetch_code", "untouched_code"]

Code = Mapping[str, Sequence[tuple[int, int]]]
"""Library file -> (offset, bytes) of what is used of it."""

_MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 3, 4, 22
_SMALLEST_BYTES = 2**20
_APART_BYTES = 2**16
"""The kernel maps so much around a fault: what lies closer together is one range."""
_PRESENT = 1 << 63
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) +(/.*)")


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Addresses that map a file read-only, for this process alone; `offset` is where in the file they begin."""

    begin: int
    end: int
    offset: int
    path: str


def drop_idle_pages() -> None:
    """Give back free heap and every page of library code; those that are in use come back from the page cache.

    Importing torch touches 75 MB of its libraries, running a model a third of that. Pages that come back cost a minor
    fault for each 64 KiB. About 15 ms.
    """
    trim_heap()
    if (madvise := _madvise()) is None:
        return
    with _loaded({mapped.path for mapped in _libraries() if mapped.end - mapped.begin >= _SMALLEST_BYTES}) as paths:
        for begin, end in untouched_code(_lines("/proc/self/smaps"), paths):
            madvise(begin, end - begin, _MADV_DONTNEED)


@contextmanager
def _loaded(paths: Iterable[str]) -> Iterator[Set[str]]:
    """Those of the files that are libraries of this process; they are loaded whole, and stay, within the block.

    Another thread may be loading one, whose pages are still to be written, or unload one, whose addresses may be
    anybody's from then on. The loader is asked for what it has already: it answers when it is done with what it does.
    """
    loader = ctypes.CDLL(None)
    loader.dlopen.argtypes, loader.dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    loader.dlclose.argtypes = (ctypes.c_void_p,)
    handles = {path: loader.dlopen(os.fsencode(path), os.RTLD_NOLOAD | os.RTLD_LAZY) for path in paths}
    try:
        yield {path for path, handle in handles.items() if handle} | {os.path.realpath("/proc/self/exe")}
    finally:
        for handle in handles.values():
            if handle:
                loader.dlclose(handle)


def untouched_code(smaps: Iterable[str], paths: Set[str]) -> Iterator[tuple[int, int]]:
    """Address ranges, of a megabyte or more, that map these files read-only, with no page that differs from its file.

    **Guarantee.** No range has an anonymous page: relocated data, which is read-only after it was written, would be
    lost. So a page that is dropped reads the same when it comes back.
    """
    mapped = None
    for line in smaps:
        if line[0] in "0123456789abcdef":
            mapped = _mapped(line)
        elif mapped is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            if mapped.path in paths and mapped.end - mapped.begin >= _SMALLEST_BYTES:
                yield mapped.begin, mapped.end


def code_in_use() -> Code:
    """What this process has looked at of its libraries' code since it last gave that back, by file.

    Whole pages; ranges less than 64 KiB apart are one. Empty where the system does not say.
    """
    used: dict[str, list[tuple[int, int]]] = {}
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            for mapped in _libraries():
                pagemap.seek(mapped.begin // mmap.PAGESIZE * 8)
                entries = array("Q", pagemap.read((mapped.end - mapped.begin) // mmap.PAGESIZE * 8))
                for begin, end in _runs([entry & _PRESENT != 0 for entry in entries]):
                    used.setdefault(mapped.path, []).append((mapped.offset + begin, end - begin))
    except OSError:
        return {}
    return used


def fetch_code(code: Code) -> None:
    """Have these ranges in memory, mapped, as far as this process has their libraries loaded.

    Read together, and no more than them: a fault on each would read megabytes around it while the weights wait, in a
    tight cgroup at the cost of code read before. Blocking until they are read; changes of a library do no harm.
    """
    if (madvise := _madvise()) is None:
        return
    ranges = [
        (mapped.begin + first - mapped.offset, last - first)
        for mapped in _libraries()
        for offset, nbytes in code.get(mapped.path, ())
        if (first := max(offset, mapped.offset))
        < (last := min(offset + nbytes, mapped.offset + mapped.end - mapped.begin))
    ]
    for advice in (_MADV_WILLNEED, _MADV_POPULATE_READ):  # the latter since Linux 5.14
        for begin, nbytes in ranges:
            madvise(begin, nbytes, advice)


def drop_read_around() -> None:
    """Take out of the page cache what faults on library code have read besides the pages asked for.

    A fault may read megabytes. In a cgroup that is full, other code is given up for them, which is missed at once: 100
    of 384 MiB were seen to hold such pages, while a run read the same 30 MiB of code again and again. Pages that any
    process has mapped stay. Milliseconds.
    """
    for path in {mapped.path for mapped in _libraries() if mapped.end - mapped.begin >= _SMALLEST_BYTES}:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:  # replaced or removed since it was loaded
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _runs(present: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(begin, end), in bytes, of pages that are there, small gaps included."""
    page, run = 0, None
    for there, pages in groupby(present):
        count = len(list(pages))
        if there:
            begin, end = page * mmap.PAGESIZE, (page + count) * mmap.PAGESIZE
            if run is not None and begin - run[1] >= _APART_BYTES:
                yield run
                run = None
            run = (begin if run is None else run[0], end)
        page += count
    if run is not None:
        yield run


def _libraries() -> list[_Mapped]:
    return [mapped for line in _lines("/proc/self/maps") if (mapped := _mapped(line)) is not None]


def _mapped(line: str) -> _Mapped | None:
    """A line of /proc/self/maps, if it is a private, read-only mapping of a file."""
    match = _RANGE.match(line)
    if match is None or "w" in match[3] or match[3][3] != "p":
        return None
    return _Mapped(int(match[1], 16), int(match[2], 16), int(match[4], 16), match[6])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = madvise
    return found
