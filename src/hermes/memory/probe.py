"""What the process really occupies, and what the world around it allows: the figures the ledger is checked against.

Reads /proc and the cgroup file system; imports nothing but the standard library. Reservations, which are promises and
not measurements, are in `ledger`. Where a figure does not exist on this system, the function says so with None, or
documents the bound it gives instead.
"""

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Cgroup",
    "MemorySplit",
    "available_bytes",
    "find_cgroup",
    "major_faults",
    "memory_pressure",
    "memory_split",
    "num_cores",
    "own_bytes",
    "peak_resident_bytes",
    "process_read_bytes",
    "resident_and_mapped_bytes",
    "resident_bytes",
]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
#: cgroup v1 writes "no limit" as the largest page-aligned 63-bit number, which differs with the page size.
_UNLIMITED_BYTES = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySplit:
    """The resident set by kind; the three add up to it."""

    anon_bytes: int
    file_bytes: int
    shmem_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cgroup:
    """The memory cgroup that binds this process tightest.

    `directory` is the one among the process's own cgroup and its ancestors that has the smallest limit (its own where
    none has any): charge, refaults and kills are read there, so that they are about the limit that will be hit. Of v2's
    two limits the lower one counts: above memory.max processes are killed, above memory.high they are held up.
    """

    version: int
    directory: Path
    limit_bytes: int | None

    def charged_bytes(self) -> int:
        """Bytes charged now: anonymous memory, page cache and kernel memory of every process inside."""
        return _number(self.directory / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")) or 0

    def refaults(self) -> int:
        """Evicted file pages read back so far: while it rises, the limit is squeezing out pages that are in use.

        Major faults where the kernel does not count refaults; those also rise when a page is read for the first time.
        """
        stat = _table(self.directory / "memory.stat")
        # v1 counts a subtree under names of its own.
        names = ("workingset_refault_file", "workingset_refault", "pgmajfault")
        counted = (f"{prefix}{name}" for name in names for prefix in ("total_", ""))
        return next((stat[name] for name in counted if name in stat), 0)

    def oom_kills(self) -> int:
        """Processes killed so far because this limit could not be kept."""
        events = self.directory / ("memory.events" if self.version == 2 else "memory.oom_control")
        return _table(events).get("oom_kill", 0)


def resident_bytes() -> int:
    """Resident set now. A few microseconds, so an agent may ask once per block.

    The kernel adds up per-CPU counters lazily here: true to within some hundred KiB. Off Linux, the peak.
    """
    return resident_and_mapped_bytes()[0]


def resident_and_mapped_bytes() -> tuple[int, int]:
    """The same, and of it the pages of files and shared memory: what the system may take away. 0 of them off Linux."""
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return peak_resident_bytes(), 0
    try:
        _, resident, mapped, _ = os.read(statm, 256).split(maxsplit=3)
    finally:
        os.close(statm)
    return int(resident) * _PAGE_BYTES, int(mapped) * _PAGE_BYTES


def own_bytes() -> int:
    """Memory that this process shares with no other, written to since it was forked; 0 where nobody counts."""
    return _table(Path("/proc/self/smaps_rollup")).get("Private_Dirty", 0) * 1024


def peak_resident_bytes() -> int:
    """Largest resident set since this program started.

    Not `ru_maxrss` on Linux: exec carries the peak of the forked image over into it, so a program started from a big
    parent reports the parent's peak as its own. VmHWM belongs to the address space, which exec makes anew.
    """
    high_water = _table(Path("/proc/self/status")).get("VmHWM")
    if high_water is not None:
        return high_water * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_split() -> MemorySplit:
    """The resident set by kind; off Linux all of it counts as anonymous."""
    status = _table(Path("/proc/self/status"))
    if "RssAnon" not in status:
        return MemorySplit(anon_bytes=resident_bytes(), file_bytes=0, shmem_bytes=0)
    return MemorySplit(
        anon_bytes=status["RssAnon"] * 1024,
        file_bytes=status["RssFile"] * 1024,
        shmem_bytes=status["RssShmem"] * 1024,
    )


def available_bytes() -> int:
    """Memory this machine could hand out without swapping, cgroups aside; off Linux all it has."""
    available = _table(Path("/proc/meminfo")).get("MemAvailable")
    return available * 1024 if available is not None else os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def major_faults() -> int:
    """Page faults of this process that waited for the disk so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def process_read_bytes() -> int | None:
    """Bytes this process made the block layer fetch so far (direct or read ahead); None where nobody counts."""
    return _table(Path("/proc/self/io")).get("read_bytes")


def memory_pressure(cgroup: Cgroup | None = None) -> float | None:
    """Per cent of the last ten seconds in which some task waited for memory: of the cgroup, else of the machine.

    None where the kernel keeps no pressure stall information.
    """
    places = [Path("/proc/pressure/memory")]
    if cgroup is not None:
        places.insert(0, cgroup.directory / "memory.pressure")
    for place in places:
        match = re.search(r"some avg10=([\d.]+)", _text(place))
        if match:
            return float(match[1])
    return None


def find_cgroup(root: Path = Path("/")) -> Cgroup | None:
    """The memory cgroup of this process, v1 or v2; None where there is none to be seen. `root` is for tests."""
    for version, own, top in _hierarchies(root):
        usage, *limiting = (
            ("memory.usage_in_bytes", "memory.limit_in_bytes")
            if version == 1
            else ("memory.current", "memory.max", "memory.high")
        )
        lineage = [d for d in (own, *own.parents) if d.is_relative_to(top) and (d / usage).exists()]
        if not lineage:
            continue  # v2 mounted for other controllers, or only the root group, which has no memory files
        found = [(_number(directory / limit), directory) for directory in lineage for limit in limiting]
        limits = [(n, directory) for n, directory in found if n is not None and n < _UNLIMITED_BYTES]
        # min() keeps the first of equals: the innermost.
        limit_bytes, directory = min(limits, key=lambda pair: pair[0], default=(None, lineage[0]))
        return Cgroup(version=version, directory=directory, limit_bytes=limit_bytes)
    return None


def _hierarchies(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """(version, own directory, mount point) of each hierarchy that may account memory.

    v1 first: where its memory controller is mounted, the v2 tree beside it has none.
    """
    paths: dict[int, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            paths[1] = path
        elif number == "0":
            paths[2] = path
    mounts: dict[int, list[tuple[str, str]]] = {1: [], 2: []}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        mounted, point = (_unescape(field) for field in fields.split(" ")[3:5])
        if kind == "cgroup2":
            mounts[2].append((mounted, point))
        elif kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            mounts[1].append((mounted, point))
    for version in (1, 2):
        if version in paths and mounts[version]:
            own = Path(paths[version])
            # Another group's subtree may be mounted before the one that this process's group lies in.
            mounted, point = next((one for one in mounts[version] if _holds(one[0], own)), mounts[version][0])
            top = root / point.lstrip("/")
            # A container sees its own group as the mount's root, whatever its full path is called outside.
            yield version, top / own.relative_to(mounted) if _holds(mounted, own) else top, top


def _holds(mounted: str, own: Path) -> bool:
    return own.is_relative_to(mounted) and ".." not in own.parts


def _unescape(field: str) -> str:
    """Undo mountinfo's escapes: it writes space, tab, newline and backslash in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _text(path: Path) -> str:
    """What the file says; "" where it cannot be read (absent, forbidden, or switched off in the kernel)."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The file's number; None for "max" and for a file that cannot be read."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """`name number` or `name: number unit` lines; others are passed over."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}
