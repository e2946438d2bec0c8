"""Tensors found inside torch.save archives, and pickles that must neither run nor get through."""

import collections
import io
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.checkpoint.torch_zip import read_torch_zip
from hermes.errors import CheckpointError


def matches(path, expected, raw):
    entries = read_torch_zip(path, 2)
    assert set(entries) == set(expected)
    with open(path, "rb") as stream:
        for name, entry in entries.items():
            stream.seek(entry.extent.offset)
            assert entry.shape == tuple(expected[name].shape)
            assert entry.extent.file == 2
            assert stream.read(entry.extent.nbytes) == raw(expected[name])
    return entries


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_wrote(tmp_path, state_dict, raw, protocol):
    torch.save(state_dict, tmp_path / "w.bin", pickle_protocol=protocol)
    entries = matches(tmp_path / "w.bin", state_dict, raw)
    assert entries["layer.0.weight"].dtype == "BF16"
    assert entries["eighths"].dtype == "F8_E4M3"


def test_module_state_dict_with_its_metadata(tmp_path, raw):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    torch.save(module.state_dict(), tmp_path / "w.pt")
    matches(tmp_path / "w.pt", module.state_dict(), raw)


def test_parameters_and_values_that_are_no_tensors(tmp_path, raw):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    marked = torch.nn.Parameter(torch.randn(2))
    marked.note = "kept by torch with its attributes"
    saved = {
        "w": weight, "m": marked, "size": torch.Size([1, 2]), "bytes": b"abc", "set": {1}, "complex": 1j,
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "args": {"lr": 1e-3, "deep": [1, (2, None)]}, 7: "x",
    }  # fmt: skip
    torch.save(saved, tmp_path / "w.pt")
    matches(tmp_path / "w.pt", {"w": weight, "m": marked}, raw)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_wrapped_state_dicts(tmp_path, state_dict, raw, wrapper):
    torch.save({"epoch": 3, wrapper: state_dict, "ema": torch.zeros(2)}, tmp_path / "w.pt")
    matches(tmp_path / "w.pt", state_dict, raw)


def test_tied_weights_share_an_extent_and_views_keep_their_offset(tmp_path, raw):
    weight = torch.randn(10, 4)
    saved = {"a": weight, "b": weight, "rows": weight[3:5], "one": weight[:, 2:3][4:5]}
    torch.save(saved, tmp_path / "w.pt")
    entries = matches(tmp_path / "w.pt", saved, raw)
    assert entries["a"].extent == entries["b"].extent
    assert entries["rows"].extent.offset == entries["a"].extent.offset + 3 * 4 * 4


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, 1:], lambda t: t[:1].expand(4, 6)])
def test_non_contiguous_is_refused_by_name(tmp_path, view):
    torch.save({"w": view(torch.randn(4, 6))}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'w' is non-contiguous; re-save with \.contiguous\(\)"):
        read_torch_zip(tmp_path / "w.pt", 0)


def test_lazy_views_are_refused(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'w' is a lazy conj"):
        read_torch_zip(tmp_path / "w.pt", 0)


def test_unknown_dtype_is_refused_by_name(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'w' is of torch\.ComplexDoubleStorage"):
        read_torch_zip(tmp_path / "w.pt", 0)


def rewritten(source, target, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    """A copy of an archive with records changed, or left out where `change` gives None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            content = change(info.filename.partition("/")[2], old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return target


@pytest.fixture
def saved(tmp_path):
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


CHANGES = {
    "big endian": (lambda name, content: b"big" if name == "byteorder" else content, "byte order is b'big'"),
    "no pickle": (lambda name, content: None if name == "data.pkl" else content, "0 data.pkl records"),
    "no data": (lambda name, content: None if name == "data/0" else content, "record 'data/0' is missing"),
    "short data": (lambda name, content: content[:-1] if name == "data/0" else content, "record has 23"),
    "cut pickle": (lambda name, content: content[:50] if name == "data.pkl" else content, "data.pkl is corrupt"),
    "TorchScript": (lambda name, content: content, "TorchScript"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_archives_are_refused(tmp_path, saved, change):
    edit, pattern = CHANGES[change]
    path = rewritten(saved, tmp_path / "w.pt", edit)
    if change == "TorchScript":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("saved/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_torch_zip(path, 0)
    assert "\n" not in str(caught.value)


def test_compressed_records_are_refused(tmp_path, saved):
    path = rewritten(saved, tmp_path / "w.pt", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_torch_zip(path, 0)


def test_files_from_before_byteorder_records(tmp_path, saved, raw):
    path = rewritten(saved, tmp_path / "w.pt", lambda name, content: None if name == "byteorder" else content)
    matches(path, torch.load(saved), raw)


def test_every_truncation_is_refused(tmp_path, saved):
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "w.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_torch_zip(tmp_path / "w.pt", 0)


def test_archives_over_four_gigabytes(tmp_path, saved, raw):
    path = tmp_path / "big.pt"
    with open(path, "wb") as stream:
        stream.write(b"PK\x03\x04")
        # A hole: it takes no room on the disk.
        stream.truncate(5 << 30)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "a") as new:
        for info in old.infolist():
            with new.open(info.filename, "w", force_zip64=True) as record:
                record.write(old.read(info))
    entries = matches(path, torch.load(saved), raw)
    assert entries["w"].extent.offset > 5 << 30


def archive(path, pickled):
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("archive/data.pkl", pickled)
        new.writestr("archive/byteorder", b"little")
        new.writestr("archive/data/0", bytes(24))
    return path


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def attacks(marker):
    command = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    call = f"(S'{command}'\n".encode()
    yield from (pickle.dumps({"w": Evil(eval, python)}, protocol) for protocol in range(6))
    yield from (pickle.dumps(Evil(exec, python), protocol) for protocol in range(6))
    yield from (pickle.dumps(Evil(open, str(marker), "w"), protocol) for protocol in range(6))
    yield b"\x80\x02cos\nsystem\n" + call + b"tR."
    yield b"\x80\x02cposix\nsystem\n" + call + b"tR."
    yield b"\x80\x02c__builtin__\neval\n" + call + b"tR."
    yield b"\x80\x02(ios\nsystem\n" + f"S'{command}'\n".encode() + b"."
    yield b"\x80\x02(cos\nsystem\n" + f"S'{command}'\n".encode() + b"o."
    yield b"\x80\x02cos\nsystem\n" + call + b"t\x81."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93" + call + b"tR."
    yield b"\x80\x04\x8c\x0dtorch._utils \x8c\x06system\x93."
    yield b"\x80\x02ctorch.serialization\nos.system\n" + call + b"tR."
    yield b"\x80\x02\x82\x01."


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    for pickled in attacks(marker):
        with pytest.raises(CheckpointError) as caught:
            read_torch_zip(archive(tmp_path / "evil.pt", pickled), 0)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def test_a_refused_global_is_named(tmp_path):
    path = archive(tmp_path / "evil.pt", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    with pytest.raises(CheckpointError, match=r"evil\.pt: its pickle refers to 'posix\.system'"):
        read_torch_zip(path, 0)
    torch.save({"w": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"'torch\.nn\.modules\.linear\.Linear'.* save its state_dict"):
        read_torch_zip(tmp_path / "module.pt", 0)


def test_hostile_pickles_stay_small(tmp_path):
    deep = b"\x80\x02)" + b"\x85" * 300_000
    hostile = [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo index that makes Python's Unpickler ask for 32 GiB
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",  # a text longer than any memory
        deep + b".",
        b"\x80\x02}" + deep[2:] + b"Ns.",  # a key whose hash would exhaust the C stack
        b"\x80\x02(((((.",
        b"\x80\x02t.",
        b".",
    ]
    for pickled in hostile:
        with pytest.raises(CheckpointError):
            read_torch_zip(archive(tmp_path / "w.pt", pickled), 0)


def test_one_list_does_not_become_many_tables(tmp_path):
    pairs = b"".join(b"X\x04\x00\x00\x00%04dK\x01\x86" % number for number in range(2000))
    pickled = b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01(" + pairs + b"e" + b"h\x00h\x01\x85R" * 100 + b"."
    with pytest.raises(CheckpointError, match=r"its pickle of \d+ bytes makes \d+ entries of lists"):
        read_torch_zip(archive(tmp_path / "w.pt", pickled), 0)


def test_a_state_dict_without_tensors_is_refused(tmp_path):
    for saved in ({}, {"a": 1}, [torch.zeros(2)], torch.zeros(2), collections.OrderedDict(model={})):
        torch.save(saved, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="no tensors"):
            read_torch_zip(tmp_path / "w.pt", 0)


def test_nothing_stays_in_the_page_cache(tmp_path, cached_pages, evicted):
    path = tmp_path / "w.pt"
    torch.save({str(number): torch.zeros(1 << 18) for number in range(4)}, path)
    evicted(path)
    read_torch_zip(path, 0)
    assert cached_pages(path) == 0


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "w.pt"


def small_archive():
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2, 3), "n": torch.tensor(3), "p": torch.nn.Parameter(torch.ones(1))}, buffer)
    return buffer.getvalue()


WHOLE = small_archive()


def sound_or_refused(path):
    try:
        entries = read_torch_zip(path, 0)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    for entry in entries.values():
        assert 0 <= entry.extent.offset <= entry.extent.offset + entry.extent.nbytes <= path.stat().st_size


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_mutated_archives(fuzzed, data):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    fuzzed.write_bytes(content)
    sound_or_refused(fuzzed)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_mutated_pickles(fuzzed, data):
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as whole:
        pickled = bytearray(whole.read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(pickled) - 1))
        pickled[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    sound_or_refused(archive(fuzzed, bytes(pickled)))


@settings(deadline=None)
@given(pickled=st.binary(max_size=60))
def test_random_pickles(fuzzed, pickled):
    sound_or_refused(archive(fuzzed, b"\x80\x02" + pickled))
