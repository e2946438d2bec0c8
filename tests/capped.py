"""Runs a command in a fresh memory cgroup (v1 or v2), swap off, and says what it took.

    result = run_capped([sys.executable, "-m", "hermes", ...], limit_bytes=700 << 20)

A test that calls it carries `@requires_cgroup`, and is skipped with the reason where no cgroup can be made.
"""

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from hermes.memory.pages import drop_idle_pages

__all__ = ["CappedRun", "requires_cgroup", "run_capped", "why_no_cgroup"]

_ROOT = Path("/sys/fs/cgroup")
_Test = TypeVar("_Test", bound=Callable)
_NUMBERS = itertools.count()

# The command must not be exec'd by a direct child of pytest: exec hands the peak resident set of the forked image on,
# so its ru_maxrss would start at pytest's own. This shell forks once more, from its own small image; that child joins
# the groups ("0" is whoever writes it) before it becomes the command, so nothing of the command escapes the charge.
_LAUNCHER = """
n=$1; shift
(
  while [ "$n" -gt 0 ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; n=$((n - 1)); done
  exec "$@"
) &
wait $!
"""


@dataclass(frozen=True, kw_only=True)
class CappedRun:
    """How the command ended and what the kernel counted. None: this kernel does not count it.

    `returncode` is the shell's: 128 + n after signal n, so 137 after an OOM kill.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int | None
    oom_kills: int
    major_faults: int
    read_bytes: int | None


def run_capped(
    command: Sequence[str | Path],
    *,
    limit_bytes: int,
    read_bytes_per_second: int | None = None,
    disk_of: Path = Path(),
    drop_caches: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_seconds: float = 110,
) -> CappedRun:
    """Run the command under `limit_bytes`, and under a read limit on the disk that holds `disk_of` if one is given.

    The page cache is dropped first where that is allowed, with what this process has mapped of libraries: pages that
    another process has cached would be free to that one. Raises subprocess.TimeoutExpired after killing everything in
    the group.
    """
    if drop_caches:
        drop_idle_pages()
        os.sync()
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
    with _groups(limit_bytes) as (memory, io):
        # A limit that nothing reaches, where none is asked for: v1 starts to count a disk's reads with its first limit.
        limited = _limit_reads(io, _disk(disk_of), read_bytes_per_second or 1 << 40)
        if read_bytes_per_second is not None and not limited:
            pytest.skip("no cgroup here can limit disk reads")
        groups = [str(group) for group in dict.fromkeys((memory, io)) if group is not None]
        started = time.perf_counter()
        process = subprocess.Popen(
            ["/bin/sh", "-c", _LAUNCHER, "sh", str(len(groups)), *groups, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=cwd,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        finally:
            _kill_all(memory)
            process.kill()
            process.communicate()
        seconds = time.perf_counter() - started
        v2 = (memory / "memory.max").exists()
        return CappedRun(
            returncode=process.returncode,
            stdout=stdout,
            stderr=stderr,
            seconds=seconds,
            peak_bytes=_number(memory / ("memory.peak" if v2 else "memory.max_usage_in_bytes")),
            oom_kills=_field(memory / ("memory.events" if v2 else "memory.oom_control"), "oom_kill"),
            major_faults=_field(memory / "memory.stat", "pgmajfault"),
            read_bytes=_read_bytes(io) if io and limited else None,
        )


@functools.cache
def why_no_cgroup() -> str | None:
    """Why no memory cgroup can be made here; None if one can."""
    try:
        with _groups(64 << 20):
            return None
    except OSError as error:
        return f"cannot make a memory cgroup: {error}"


def requires_cgroup(test: _Test) -> _Test:
    """Mark a test `cgroup`, and skip it with the reason where no cgroup can be made."""
    reason = why_no_cgroup()
    return pytest.mark.cgroup(pytest.mark.skipif(reason is not None, reason=reason or "")(test))


@contextlib.contextmanager
def _groups(limit_bytes: int) -> Iterator[tuple[Path, Path | None]]:
    """A memory group and, where there is one, the group that counts and limits disk reads (v2: the same)."""
    name = f"hermes-test-{os.getpid()}-{next(_NUMBERS)}"
    with contextlib.ExitStack() as made:

        def make(parent: Path) -> Path:
            group = parent / name
            group.mkdir()
            made.callback(_remove, group)
            return group

        controllers = _ROOT / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text().split():
            for controller in ("+memory", "+io"):
                with contextlib.suppress(OSError):  # already on, or not ours to switch: the writes below tell
                    (_ROOT / "cgroup.subtree_control").write_text(controller)
            memory = io = make(_ROOT)
            _set(memory / "memory.max", limit_bytes)
            if (memory / "memory.swap.max").exists():
                _set(memory / "memory.swap.max", 0)
        else:
            memory = make(_ROOT / "memory")
            _set(memory / "memory.limit_in_bytes", limit_bytes)
            if (memory / "memory.memsw.limit_in_bytes").exists():
                _set(memory / "memory.memsw.limit_in_bytes", limit_bytes)
            io = make(_ROOT / "blkio") if (_ROOT / "blkio").is_dir() else None
        yield memory, io


def _set(control: Path, number: int) -> None:
    """Write an existing control file; never create one (a directory that only looks like a cgroup must fail)."""
    fd = os.open(control, os.O_WRONLY)
    try:
        os.write(fd, str(number).encode())
    finally:
        os.close(fd)


def _limit_reads(group: Path | None, disk: str, bytes_per_second: int) -> bool:
    if group is None:
        return False
    v2 = (group / "io.stat").exists()
    control = group / ("io.max" if v2 else "blkio.throttle.read_bps_device")
    try:
        control.write_text(f"{disk} rbps={bytes_per_second}" if v2 else f"{disk} {bytes_per_second}")
    except OSError:
        return False
    return True


def _disk(path: Path) -> str:
    """major:minor of the whole disk under the path; limits cannot be put on a partition."""
    device = os.stat(path).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if (node / "partition").exists():
        node = node.parent
    return (node / "dev").read_text().strip() if (node / "dev").exists() else f"{os.major(device)}:{os.minor(device)}"


def _read_bytes(group: Path) -> int:
    if (group / "io.stat").exists():
        return sum(int(word[7:]) for word in (group / "io.stat").read_text().split() if word.startswith("rbytes="))
    rows = [line.split() for line in (group / "blkio.throttle.io_service_bytes").read_text().splitlines()]
    return sum(int(row[2]) for row in rows if row[1] == "Read")


def _kill_all(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _remove(group: Path) -> None:
    """A group is busy until the kernel has buried its last process; that takes moments."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)


def _number(path: Path) -> int | None:
    return int(path.read_text()) if path.exists() else None


def _field(path: Path, name: str) -> int:
    rows = (line.split() for line in path.read_text().splitlines())
    return next(int(row[1]) for row in rows if row[0] == name)
