"""Local paths, Hub ids and the cache; the Hub itself is scripted, nothing here goes online."""

import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from hermes.checkpoint.hub import resolve_model, wanted_files
from hermes.errors import CheckpointError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with the given files, or one that raises; the calls to download are recorded."""
    script = SimpleNamespace(files=[], fault=None, cached=None, calls=[])

    def model_info(self, repository, **options):
        if script.fault is not None:
            raise script.fault
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in script.files])

    def snapshot_download(repository, *, revision=None, allow_patterns=None, local_files_only=False):
        script.calls.append((repository, revision, allow_patterns, local_files_only))
        if local_files_only:
            if script.cached is None:
                raise LocalEntryNotFoundError("nothing cached")
            return str(script.cached)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return script


def test_local_paths_stand_for_themselves(tmp_path, hub, monkeypatch):
    (tmp_path / "model.bin").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(tmp_path) == tmp_path
    assert str(resolve_model("model.bin")) == "model.bin"
    (tmp_path / "bert").mkdir()
    assert str(resolve_model("bert", revision="main")) == "bert"
    assert not hub.calls


@pytest.mark.parametrize(
    "model", ["./gone", "/gone/model", "a/b/c", "../gone", "gone.safetensors", "org/w.bin", "", "a b"]
)
def test_paths_that_do_not_exist(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        resolve_model(model)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        resolve_model(tmp_path / "org")
    assert not hub.calls


def test_a_weight_file_is_never_on_the_hub(tmp_path):
    for model in ("net.safetensors", tmp_path / "net.pt"):
        with pytest.raises(CheckpointError, match=r"; give the path of a weight file that exists$"):
            resolve_model(model)


def test_a_hub_id_is_downloaded_without_what_is_not_needed(hub, tmp_path):
    hub.files = ["config.json", "model.safetensors", "pytorch_model.bin", "README.md", "onnx/model.onnx", "odd[1].json"]
    assert resolve_model("org/name", revision="v1") == tmp_path
    assert hub.calls == [("org/name", "v1", ["config.json", "model.safetensors", "odd[[]1].json"], False)]


WANTED = [
    (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    (
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json", "a.safetensors"],
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
    ),
    (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "training_args.bin"], ["pytorch_model.bin"]),
    (["pytorch_model-1.bin", "pytorch_model.bin.index.json"], ["pytorch_model-1.bin", "pytorch_model.bin.index.json"]),
    (["weights.safetensors", "original/consolidated.00.pth"], ["weights.safetensors"]),
    (["a.safetensors", "b.safetensors"], []),
    (
        ["config.json", "tokenizer.model", "merges.txt", "1_Pooling/config.json", "a/_Pooling/config.json", "b/c.json"],
        ["1_Pooling/config.json", "config.json", "merges.txt", "tokenizer.model"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("names", "wanted"), WANTED)
def test_one_set_of_weights_is_wanted(names, wanted):
    assert wanted_files(names) == wanted


def test_offline_takes_what_is_cached(hub, tmp_path):
    hub.fault, hub.cached = OfflineModeIsEnabled("offline"), tmp_path / "snapshot"
    assert resolve_model("name") == tmp_path / "snapshot"
    assert hub.calls == [("name", None, None, True)]


def test_offline_and_not_cached(hub):
    hub.fault = OfflineModeIsEnabled("offline")
    with pytest.raises(CheckpointError, match=r"org/name: not an existing path, .* cannot be reached .* go online"):
        resolve_model("org/name")


def test_the_real_cache_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="go online once"):
        resolve_model("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(snapshot.name)
    assert resolve_model("org/name") == snapshot
    with pytest.raises(CheckpointError, match="at revision v2"):
        resolve_model("org/name", revision="v2")
    with pytest.raises(CheckpointError, match="valid Hub id"):
        resolve_model("org/double--dash")


def test_opening_local_files_imports_neither_torch_nor_the_hub():
    code = "import sys, hermes.checkpoint; print(*{'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
