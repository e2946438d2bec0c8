"""Packed directories: the same tensors, read as what they were; whole or not at all; corruption is found and named."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hermes.checkpoint import Extent, open_checkpoint, open_reader
from hermes.checkpoint.chunks import PackedFile, PackedTensor
from hermes.checkpoint.layout import CHUNK_ELEMENTS
from hermes.checkpoint.pack import pack
from hermes.checkpoint.partial import partial_directory
from hermes.checkpoint.unpack import read_unpacked, unpack, verify
from hermes.errors import CheckpointError, InputError, ReadError


@pytest.fixture
def model(tmp_path, state_dict):
    """A directory of two shards with everything beside them, the second of several chunks."""
    source = tmp_path / "model"
    source.mkdir()
    large = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).mul(0.02)
    state_dict["layer.0.weight"].mul_(0.02)
    more = {"large.weight": large.to(torch.bfloat16), "rounded": large.half().float()}
    save_file(state_dict, source / "model-00001-of-00002.safetensors", metadata={"format": "pt", "who": "äöü"})
    save_file(more, source / "model-00002-of-00002.safetensors")
    places = {
        **dict.fromkeys(state_dict, "model-00001-of-00002.safetensors"),
        **dict.fromkeys(more, "model-00002-of-00002.safetensors"),
    }
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (source / "config.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    return source


def contents(path):
    """Dtype, shape and bytes of every tensor."""
    checkpoint = open_checkpoint(path)
    with open_reader(checkpoint) as reader:

        def content(extent):
            if checkpoint.packed:
                return b"".join(map(bytes, read_unpacked(reader, checkpoint, extent)))
            return reader.read_bytes(extent)

        return {name: (e.dtype, e.shape, content(e.extent)) for name, e in checkpoint.tensors.items()}


def test_there_and_back(model, tmp_path):
    packed, back = tmp_path / "packed", tmp_path / "back"
    told = []
    pack(model, packed, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(len(content) for *_, content in contents(model).values())
    assert contents(packed) == contents(model)
    assert (packed / "config.json").exists()
    assert (packed / "1_Pooling" / "config.json").exists()
    assert verify(packed, model) == told[-1][1]
    unpack(packed, back)
    for file in model.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert not list(back.glob("hermes-pack*"))
    again = (packed / "model-00001-of-00002.safetensors").stat()
    pack(model, packed)
    assert (packed / "model-00001-of-00002.safetensors").stat() == again


def shards(source, places):
    """A directory of one tensor in each file, and the index that says where they are."""
    for name, place in places.items():
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.full((40, 40), float(len(name)))}, source / place)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return source


def test_one_shard_of_another_name_keeps_an_index(tmp_path):
    model = shards(tmp_path / "model", {"a": "model-00001-of-00001.safetensors"})
    pack(model, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    for made in ("packed", "back"):
        index = json.loads((tmp_path / made / "model.safetensors.index.json").read_bytes())
        assert index["weight_map"] == {"a": "model-00001-of-00001.safetensors"}
    assert contents(tmp_path / "back") == contents(model)


def test_files_of_one_name_in_several_folders(tmp_path):
    model = shards(tmp_path / "model", {"a": "x/m.safetensors", "bb": "y/m.safetensors"})
    pack(model, tmp_path / "packed")
    verify(tmp_path / "packed", model)
    unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "packed") == contents(model)


def test_planes_are_plain_tensors(model, tmp_path):
    from safetensors import safe_open

    pack(model, tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model-00002-of-00002.safetensors", "pt") as file:
        assert "large.weight" in file.keys()
        assert file.get_tensor("large.weight").dtype is torch.uint8


def test_a_torch_archive_is_packed_too(tmp_path, state_dict):
    del state_dict["scale"]
    state_dict["tied"] = state_dict["embed.weight"]
    torch.save(state_dict, tmp_path / "weights.bin")
    pack(tmp_path / "weights.bin", tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents_of(state_dict)


def contents_of(state_dict):
    from hermes.model.blocks import _TORCH_DTYPES

    spelt = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
    return {
        name: (spelt[t.dtype], tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in state_dict.items()
    }


@pytest.mark.parametrize("lost", [0, 1, 100, 40_000])
def test_a_killed_pack_is_gone_on_with(model, tmp_path, lost, monkeypatch):
    whole, packed = tmp_path / "whole", tmp_path / "packed"
    pack(model, whole)

    def killed(path):
        if "00002-of" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr("hermes.checkpoint.pack.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(model, packed)
    assert not packed.exists()
    (unfinished,) = tmp_path.glob(".packed.partial/*.unfinished")
    with open(unfinished, "r+b") as file:
        file.truncate(unfinished.stat().st_size - lost)
    monkeypatch.undo()
    pack(model, packed)
    for file in whole.glob("*.safetensors"):
        assert (packed / file.name).read_bytes() == file.read_bytes()


def test_what_is_in_the_way_stays(model, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    with pytest.raises(InputError, match="not empty"):
        pack(model, tmp_path / "there")
    with pytest.raises(InputError, match="is not packed"):
        unpack(model, tmp_path / "out")
    pack(model, tmp_path / "packed")
    with pytest.raises(InputError, match="packed already"):
        pack(tmp_path / "packed", tmp_path / "twice")


def test_one_process_at_a_time(tmp_path):
    with partial_directory(tmp_path / "out", "stamp", {}):
        with pytest.raises(InputError, match="being written"), partial_directory(tmp_path / "out", "stamp", {}):
            pass
    assert (tmp_path / "out" / "stamp").exists()


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_byte_is_found_and_named(model, tmp_path, seed):
    packed = tmp_path / "packed"
    pack(model, packed)
    path = packed / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    place = random.Random(seed).randrange(start, len(content))
    content[place] ^= 1 << seed % 8
    path.write_bytes(content)
    with pytest.raises((ReadError, CheckpointError), match=r"00002-of-00002.*(chunk \d+ is corrupt|as long as|pack)"):
        verify(packed)


def test_a_truncated_or_foreign_file_is_refused(model, tmp_path):
    packed = tmp_path / "packed"
    pack(model, packed)
    path = packed / "model-00001-of-00002.safetensors"
    text = path.read_bytes()
    path.write_bytes(text[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(packed)
    path.write_bytes(text.replace(b"hermes-pack-1", b"hermes-pack-9"))
    with pytest.raises(CheckpointError, match="packed as hermes-pack-9, this Hermes reads hermes-pack-1"):
        open_checkpoint(packed)
    shutil.copy(packed / "model-00002-of-00002.safetensors", path)
    with pytest.raises(CheckpointError):
        open_checkpoint(packed)


@given(
    numels=st.lists(st.integers(1, 3 * CHUNK_ELEMENTS), min_size=1, max_size=4),
    item_bytes=st.sampled_from([1, 2, 4]),
    run_bytes=st.integers(1, 400_000),
    unpacked_bytes=st.none() | st.integers(1, 400_000),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_runs_hold_every_byte_once_in_order(numels, item_bytes, run_bytes, unpacked_bytes, data):
    tensors, begin, place = [], 96, 5000
    for number, numel in enumerate(numels):
        sizes = [data.draw(st.integers(25, 90_000)) for _ in range(-(-numel // CHUNK_ELEMENTS))]
        places = np.cumsum([place, *sizes])
        tensors.append(
            PackedTensor(
                name=str(number),
                path=None,
                item_bytes=item_bytes,
                begin=begin,
                nbytes=numel * item_bytes,
                places=places,
            )
        )
        begin, place = begin + numel * item_bytes, int(places[-1])
    total = sum(numels)
    first = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - first))
    file = PackedFile(tensors=tensors)
    position = 96 + first * item_bytes
    end = position + count * item_bytes
    for run in file.runs(position, count * item_bytes, run_bytes=run_bytes, unpacked_bytes=unpacked_bytes):
        tensor = run.tensor
        chunk_bytes = CHUNK_ELEMENTS * item_bytes
        assert position == tensor.begin + run.number * chunk_bytes + run.skip * item_bytes
        assert run.skip < CHUNK_ELEMENTS
        last = -(-(position + run.unpacked_bytes - tensor.begin) // chunk_bytes)
        assert run.offset == tensor.places[run.number]
        assert run.offset + run.nbytes == tensor.places[last]
        assert run.nbytes <= run_bytes or last == run.number + 1
        assert unpacked_bytes is None or run.unpacked_bytes <= unpacked_bytes or last == run.number + 1
        position += run.unpacked_bytes
    assert position == end


def test_an_extent_of_several_tensors(model, tmp_path):
    pack(model, tmp_path / "packed")
    plain, packed = open_checkpoint(model), open_checkpoint(tmp_path / "packed")
    entries = [entry.extent for entry in plain.tensors.values() if entry.extent.file == 1]
    begin, end = min(e.offset for e in entries) + 8, max(e.offset + e.nbytes for e in entries) - 4
    extent = Extent(file=1, offset=begin, nbytes=end - begin)
    with open_reader(plain) as reader, open_reader(packed) as other:
        assert b"".join(map(bytes, read_unpacked(other, packed, extent))) == reader.read_bytes(extent)
