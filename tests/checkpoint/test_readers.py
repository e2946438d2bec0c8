"""Every byte, both ways of reading, and every way a file can fail under a running pass."""

import errno
import mmap
import os
import re
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hermes.checkpoint import Extent, open_checkpoint, open_reader
from hermes.errors import ReadError

PIECE = 1 << 16


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def direct(request, tmp_path):
    """Both ways; the direct one is skipped where the file system does not take part."""
    if request.param:
        (tmp_path / "probe").write_bytes(b"0" * 5000)
        try:
            os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("no O_DIRECT on this file system")
    return request.param


@pytest.fixture
def checkpoint(tmp_path, state_dict):
    save_file(state_dict | {"big": torch.arange(200_001)}, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


@pytest.fixture
def target():
    """A page-aligned target that is given back without a view left open."""
    memory = mmap.mmap(-1, PIECE)
    view = memoryview(memory)
    yield view
    view.release()


def test_every_tensor_equals_what_safetensors_loads(checkpoint, direct, raw):
    expected = load_file(checkpoint.files[0].path)
    with open_reader(checkpoint, direct=direct) as reader:
        assert reader.direct is direct
        assert reader.alignment == (4096 if direct else 1)
        assert {name: reader.read_bytes(e.extent) for name, e in checkpoint.tensors.items()} == {
            name: raw(tensor) for name, tensor in expected.items()
        }


def test_every_tensor_equals_what_torch_loads(tmp_path, state_dict, direct, raw):
    torch.save(state_dict, tmp_path / "w.bin")
    checkpoint = open_checkpoint(tmp_path / "w.bin")
    expected = torch.load(tmp_path / "w.bin")
    with open_reader(checkpoint, direct=direct) as reader:
        for name, entry in checkpoint.tensors.items():
            assert reader.read_bytes(entry.extent) == raw(expected[name])


def test_whole_file_in_pieces(checkpoint, direct, target):
    content = checkpoint.files[0].path.read_bytes()
    with open_reader(checkpoint, direct=direct) as reader:
        read = bytearray()
        while len(read) < len(content):
            count = reader.read_into(0, len(read), target, min(PIECE, len(content) - len(read)))
            read += target[:count]
    assert bytes(read) == content


def test_threads_share_a_reader(checkpoint, direct, raw):
    expected = load_file(checkpoint.files[0].path)
    wrong = []

    def agent():
        for _ in range(5):
            for name, entry in checkpoint.tensors.items():
                if reader.read_bytes(entry.extent) != raw(expected[name]):
                    wrong.append(name)

    with open_reader(checkpoint, direct=direct) as reader:
        agents = [threading.Thread(target=agent) for _ in range(4)]
        for thread in agents:
            thread.start()
        for thread in agents:
            thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "model.safetensors"
    save_file({"w": torch.arange(50_001, dtype=torch.int32)}, path)
    with open_reader(open_checkpoint(path), direct=False) as reader:
        yield reader, path.read_bytes()


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 9000), max_size=40),
    block=st.integers(0, 48),
    alignment=st.sampled_from([1, 512, 4096]),
)
def test_short_reads_are_continued_on_the_boundary(odd_file, counts, block, alignment):
    reader, content = odd_file
    reader.alignment = alignment
    preadv, progress = os.preadv, []

    def chopped(fd, targets, offset):
        assert offset % alignment == 0
        count = preadv(fd, [targets[0][: counts.pop()] if counts else targets[0]], offset)
        progress.append(offset + count)
        return count

    memory = bytearray(PIECE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", chopped)
        count = reader.read_into(0, block * 4096, memoryview(memory), 0)
    expected = content[block * 4096 :][:PIECE]
    assert expected.startswith(memory[:count])
    # Only a read that got no further than the one before it, as at the end of a truncated file, may give up.
    assert count == len(expected) or progress[-1] <= max(progress[:-1], default=block * 4096)


def test_truncated_while_running(checkpoint, direct, target):
    path = checkpoint.files[0].path
    with open_reader(checkpoint, direct=direct) as reader:
        os.truncate(path, PIECE + 5000)
        assert reader.read_into(0, PIECE, target, 5000) == 5000
        with pytest.raises(
            ReadError, match=f"{re.escape(str(path))}: truncated while running: 5000 of 6000 .* {PIECE}"
        ):
            reader.read_into(0, PIECE, target, 6000)
        with pytest.raises(ReadError, match="truncated"):
            reader.read_into(0, 2 * PIECE, target, 1)
        with pytest.raises(ReadError, match=f"was written to while in use .*{PIECE + 5000} now"):
            reader.check()


def test_vanished(checkpoint, direct):
    with open_reader(checkpoint, direct=direct) as reader:
        reader.check()
        checkpoint.files[0].path.unlink()
        with pytest.raises(ReadError, match="vanished"):
            reader.check()


def test_replaced(checkpoint, direct):
    path = checkpoint.files[0].path
    with open_reader(checkpoint, direct=direct) as reader:
        # Same size and time: only the inode tells.
        shutil.copy2(path, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        with pytest.raises(ReadError, match="replaced"):
            reader.check()
    with pytest.raises(ReadError, match="replaced"):
        open_reader(checkpoint, direct=direct)


def test_written_to(checkpoint, direct):
    path = checkpoint.files[0].path
    with open_reader(checkpoint, direct=direct) as reader:
        os.utime(path, ns=(0, 7))
        with pytest.raises(ReadError, match="was written to"):
            reader.check()


def test_disk_error_names_file_and_offset(checkpoint, direct, target, monkeypatch):
    def broken(fd, targets, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_reader(checkpoint, direct=direct) as reader:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(
            ReadError, match=r"model\.safetensors: reading 65536 bytes at offset 8192 failed: Input/output"
        ):
            reader.read_into(0, 8192, target, 1)
        with pytest.raises(ReadError, match="Input/output"):
            reader.read_bytes(Extent(file=0, offset=77, nbytes=3))


@pytest.mark.parametrize("fault", ["open", "read"])
def test_falls_back_where_direct_reads_do_not_work(checkpoint, monkeypatch, fault):
    real_open, real_preadv, opened = os.open, os.preadv, []

    def refuse_open(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return real_open(path, flags, *rest, **options)

    def refuse_read(fd, targets, offset):
        opened.append(len(targets[0]))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open" if fault == "open" else "preadv", refuse_open if fault == "open" else refuse_read)
    before = len(os.listdir("/proc/self/fd"))
    with open_reader(checkpoint) as reader:
        assert not reader.direct
        monkeypatch.setattr(os, "preadv", real_preadv)
        assert reader.read_bytes(Extent(file=0, offset=8, nbytes=1)) == b"{"
        monkeypatch.setattr(os, "preadv", refuse_read if fault == "read" else real_preadv)
    with pytest.raises(ReadError, match=r"model\.safetensors: direct reads refused: Invalid argument"):
        open_reader(checkpoint, direct=True)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not opened or opened[:5] == [4096, 8192, 16384, 32768, 65536]


def test_systems_without_linux_calls(checkpoint, monkeypatch, raw):
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "posix_fadvise")
    expected = load_file(checkpoint.files[0].path)
    with open_reader(checkpoint) as reader:
        assert not reader.direct
        assert reader.read_bytes(checkpoint.tensors["big"].extent) == raw(expected["big"])
    with pytest.raises(ReadError, match="no O_DIRECT"):
        open_reader(checkpoint, direct=True)


def test_close_twice_and_read_after(checkpoint, direct, target):
    before = len(os.listdir("/proc/self/fd"))
    reader = open_reader(checkpoint, direct=direct)
    reader.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    for late in (reader.check, lambda: reader.read_into(0, 0, target, 1)):
        with pytest.raises(ReadError, match="reader is closed"):
            late()


def test_missing_at_open_leaves_no_descriptor(checkpoint, direct):
    before = len(os.listdir("/proc/self/fd"))
    checkpoint.files[0].path.unlink()
    with pytest.raises(ReadError, match=r"model\.safetensors.*No such file"):
        open_reader(checkpoint, direct=direct or None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_stays_in_the_page_cache(checkpoint, direct, cached_pages, evicted):
    path = checkpoint.files[0].path
    evicted(path)
    with open_reader(checkpoint, direct=direct) as reader:
        for entry in checkpoint.tensors.values():
            reader.read_bytes(entry.extent)
        assert cached_pages(path) == 0
