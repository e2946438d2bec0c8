"""Which files hold a model's weights, and the message when they do not."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from hermes.checkpoint import Checkpoint, Extent, TensorEntry, open_checkpoint, open_reader
from hermes.errors import CheckpointError

ONE = {"one": torch.ones(3)}
TWO = {"two": torch.full((2, 2), 2.0)}


def write_index(directory, weight_map, name="model.safetensors.index.json"):
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    save_file(ONE, tmp_path / "model-1.safetensors")
    save_file(TWO, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"one": "model-1.safetensors", "two": "model-2.safetensors"})
    return tmp_path


def loads(checkpoint, expected, raw):
    assert set(checkpoint.tensors) == set(expected)
    with open_reader(checkpoint) as reader:
        for name, entry in checkpoint.tensors.items():
            assert reader.read_bytes(entry.extent) == raw(expected[name])


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_opening_leaves_nothing_in_the_page_cache(tmp_path, cached_pages, evicted, save):
    path = tmp_path / "weights"
    save({f"tensor.{number}": torch.zeros(1024) for number in range(1024)}, path)
    evicted(path)
    for _ in range(3):  # the first may leave a mark from which the system reads far ahead the next time
        open_checkpoint(path)
    assert cached_pages(path) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin", "no_suffix"])
def test_a_file_is_known_by_its_content(tmp_path, state_dict, raw, name):
    save_file(state_dict, tmp_path / name)
    loads(open_checkpoint(tmp_path / name), state_dict, raw)
    torch.save(state_dict, tmp_path / name)
    loads(open_checkpoint(str(tmp_path / name)), state_dict, raw)


def test_a_directory_is_searched_in_the_order_of_transformers(tmp_path, raw):
    save_file(ONE, tmp_path / "other.safetensors")
    loads(open_checkpoint(tmp_path), ONE, raw)
    torch.save(TWO, tmp_path / "shard.bin")
    write_index(tmp_path, {"two": "shard.bin"}, "pytorch_model.bin.index.json")
    loads(open_checkpoint(tmp_path), TWO, raw)
    torch.save(ONE, tmp_path / "pytorch_model.bin")
    loads(open_checkpoint(tmp_path), ONE, raw)
    write_index(tmp_path, {"two": "shard.bin"})
    loads(open_checkpoint(tmp_path), TWO, raw)
    save_file(ONE, tmp_path / "model.safetensors")
    loads(open_checkpoint(tmp_path), ONE, raw)


def test_shards(sharded, raw):
    checkpoint = open_checkpoint(sharded)
    loads(checkpoint, ONE | TWO, raw)
    assert [stamp.path.name for stamp in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert open_checkpoint(sharded / "model.safetensors.index.json").fingerprint() == checkpoint.fingerprint()


def test_the_index_decides_between_shards(sharded, raw):
    save_file(ONE | {"two": torch.zeros(2, 2), "extra": torch.ones(1)}, sharded / "model-1.safetensors")
    loads(open_checkpoint(sharded), ONE | TWO | {"extra": torch.ones(1)}, raw)
    save_file(TWO | {"extra": torch.ones(1)}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="'extra' is in two shards"):
        open_checkpoint(sharded)


def test_links_as_in_the_hubs_cache(sharded, tmp_path_factory, raw):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for name in os.listdir(sharded):
        os.symlink(os.path.relpath(sharded / name, snapshot), snapshot / name)
    loads(open_checkpoint(snapshot), ONE | TWO, raw)


def test_a_relative_path_survives_a_change_of_directory(sharded, tmp_path_factory, monkeypatch, raw):
    monkeypatch.chdir(sharded)
    checkpoint = open_checkpoint(".")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loads(checkpoint, ONE | TWO, raw)


def refused(path, pattern):
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, r"no weights: looked for model\.safetensors, .*pytorch_model\.bin.*found none")
    save_file(ONE, tmp_path / "a.safetensors")
    save_file(ONE, tmp_path / "b.safetensors")
    refused(tmp_path, "found 2 .* no index")


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"GGUF then other things")
    refused(path, "neither safetensors nor a torch.save archive")
    path.write_bytes(b"")
    refused(path, "neither")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "git lfs pull")
    torch.save(ONE, path, _use_new_zipfile_serialization=False)
    refused(path, "before 1.6 .* save it again with torch.save")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    os.symlink("gone", tmp_path / "model.safetensors")
    refused(tmp_path, "dangling link")


def test_missing_shard_is_named_with_its_index(sharded):
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, r"model-2\.safetensors: no such file, but model\.safetensors\.index\.json names it")


def test_tensor_missing_from_its_shard(sharded):
    write_index(sharded, {"one": "model-2.safetensors", "two": "model-2.safetensors"})
    refused(sharded, r"model-2\.safetensors: has no tensor 'one'")


@pytest.mark.parametrize("shard", ["../w", "/etc/passwd", "a/../../w", "", ".", "a\0b", "\ud800", "a\nb"])
def test_shards_stay_in_their_directory(tmp_path, shard):
    write_index(tmp_path, {"one": shard})
    refused(tmp_path, "not inside the index's directory")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff"]
)
def test_an_index_of_nonsense(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin1")
    refused(tmp_path, "index.json")


def test_names_that_are_no_text(tmp_path):
    header = json.dumps({"\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    refused(tmp_path / "w", "not valid text")


def test_shared_bytes_count_once():
    places = {
        "a": (0, 0, 100),
        "tied": (0, 0, 100),
        "empty": (0, 0, 0),
        "view": (0, 40, 80),
        "far": (0, 200, 10),
        "b": (1, 0, 5),
    }
    tensors = {
        name: TensorEntry(
            name=name, dtype="U8", shape=(nbytes,), extent=Extent(file=file, offset=offset, nbytes=nbytes)
        )
        for name, (file, offset, nbytes) in places.items()
    }
    assert Checkpoint(files=(), tensors=tensors).nbytes == 120 + 10 + 5
