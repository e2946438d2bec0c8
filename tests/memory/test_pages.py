"""Giving back pages that were needed while libraries were loaded."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hermes.memory.pages import drop_read_around, untouched_code

SMAPS = """\
7f0000000000-7f0000400000 r-xp 00000000 08:01 42 /lib/libcode.so
Rss:                4096 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000400000-7f0000800000 r--p 00400000 08:01 42 /lib/libcode.so
Rss:                4096 kB
Anonymous:             4 kB
7f0000800000-7f0000c00000 rw-p 00800000 08:01 42 /lib/libcode.so
Anonymous:             0 kB
7f0000c00000-7f0001000000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f0001000000-7f0001400000 r--s 00000000 08:01 43 /data/shared
Anonymous:             0 kB
7f0001400000-7f0001401000 r--p 00000000 08:01 44 /lib/small.so
Anonymous:             0 kB
"""


def test_only_pages_equal_to_their_file_are_dropped() -> None:
    lines, paths = SMAPS.splitlines(), {"/lib/libcode.so", "/data/shared", "/lib/small.so"}
    assert list(untouched_code(lines, paths)) == [(0x7F0000000000, 0x7F0000400000)]
    assert not list(untouched_code(lines, paths - {"/lib/libcode.so"}))


def test_libraries_may_come_and_go_meanwhile() -> None:
    """Pages that the loader is about to write, and addresses that are another's by now, are left alone."""
    script = """
import _ctypes, ctypes, mmap, tempfile, threading
import tokenizers
from hermes.memory.pages import drop_idle_pages
path = tokenizers.tokenizers.__file__
done = threading.Event()
wrong = []
def libraries():
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        copy.write(open(path, "rb").read())
        copy.flush()
        while not done.is_set():
            _ctypes.dlclose(ctypes.CDLL(copy.name)._handle)
def files():
    with tempfile.TemporaryFile() as file:
        file.write(bytes(2**21))
        file.flush()
        while not done.is_set():
            mmap.mmap(file.fileno(), 2**21, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
            with mmap.mmap(-1, 2**21) as memory:
                memory[:] = b"x" * 2**21
                if memory[:] != b"x" * 2**21:
                    wrong.append(1)
threads = [threading.Thread(target=one) for one in (libraries, files)]
for one in threads:
    one.start()
for _ in range(40):
    drop_idle_pages()
done.set()
for one in threads:
    one.join()
assert not wrong, len(wrong)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_what_a_computation_uses_of_the_libraries_comes_back_at_once() -> None:
    script = """
import mmap, resource, sys
import torch
from hermes.memory.pages import code_in_use, drop_idle_pages, fetch_code
from hermes.memory.probe import memory_split
a = torch.randn(64, 64)
drop_idle_pages()
expected = torch.linalg.inv(a)
used = code_in_use()
torch_cpu = next(path for path in used if path.endswith("libtorch_cpu.so"))
assert 2**16 < sum(nbytes for _, nbytes in used[torch_cpu]) < 64 * 2**20, used[torch_cpu]
assert all(offset % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0 for offset, nbytes in used[torch_cpu])
drop_idle_pages()
idle = memory_split().file_bytes
fetch_code({**used, "/no/such/library.so": [(0, 4096)], torch_cpu: [*used[torch_cpu], (2**40, 2**20)]})
assert memory_split().file_bytes > idle + sum(nbytes for _, nbytes in used[torch_cpu]) / 2
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert torch.equal(torch.linalg.inv(a), expected)
few = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
drop_idle_pages()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert torch.equal(torch.linalg.inv(a), expected)
many = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
assert few < many / 2, (few, many)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_was_read_around_leaves_the_page_cache(tmp_path: Path) -> None:
    path, nbytes = tmp_path / "library.so", 16 * 2**20
    with path.open("wb") as file:
        file.write(bytes(nbytes))
        os.fsync(file.fileno())
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert mapped[nbytes // 2] == 0
        drop_read_around()
        view = np.frombuffer(mapped, dtype=np.uint8)
        cached = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), cached) == 0
        del view
    assert cached[len(cached) // 2] & 1  # mapped, and so in use
    assert sum(page & 1 for page in cached) * mmap.PAGESIZE <= 4 * 2**20  # the folio of that page, 2 MiB at most


def test_a_process_goes_on_with_fewer_code_pages() -> None:
    script = """
import torch
from hermes.memory.pages import drop_idle_pages
from hermes.memory.probe import memory_split
a = torch.randn(64, 64)
expected = torch.linalg.inv(a) @ a
before = memory_split().file_bytes
drop_idle_pages()
after = memory_split().file_bytes
assert after < before / 2, (before, after)
assert torch.equal(torch.linalg.inv(a) @ a, expected)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
