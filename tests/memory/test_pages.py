"""Giving back pages that were needed while libraries were loaded."""

import subprocess
import sys

from hermes.memory.pages import untouched_code

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
    assert list(untouched_code(SMAPS.splitlines())) == [(0x7F0000000000, 0x7F0000400000)]


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
