import json
import math
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from capped import requires_cgroup, run_capped
from hermes.checkpoint import synth as synth_module
from hermes.checkpoint import synth_weights
from hermes.checkpoint.synth import ARCHS, STAMP_NAME, synth
from hermes.checkpoint.synth_tokenizer import tokenizer_files
from hermes.checkpoint.synth_weights import plan_shards
from hermes.errors import InputError

TINY = [name for name in ARCHS if name.startswith("tiny-")]
HEADS = {  # the class whose tensors are exactly those of the published checkpoint
    "tiny-bert": "AutoModelForPreTraining",
    "tiny-vit": "AutoModelForImageClassification",
    "tiny-gpt2": "AutoModelForCausalLM",
    "tiny-gpt-j": "AutoModelForCausalLM",
    "tiny-llama": "AutoModelForCausalLM",
}


def tensors_of(directory: Path, framework: str = "np") -> dict:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework=framework) as stored:
            found.update({name: stored.get_tensor(name) for name in stored.keys()})
    return found


@pytest.mark.parametrize("arch", TINY)
def test_transformers_finds_every_key_and_no_other(tmp_path, arch):
    import transformers

    directory = synth(arch, tmp_path / "m")
    model, info = getattr(transformers, HEADS[arch]).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == ARCHS[arch].config["model_type"]
    stored = tensors_of(directory, "pt")
    own = model.state_dict()
    matching = [name for name in stored if name in own]
    assert all(own[name].equal(stored[name]) for name in matching)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_on_request(tmp_path, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(synth("tiny-llama", tmp_path / "low", dtype=dtype))
    assert model.dtype == getattr(torch, dtype)
    wide = tensors_of(tmp_path / "low", "pt")["model.layers.1.mlp.up_proj.weight"].float()
    assert wide.mean() == pytest.approx(0, abs=1e-3)
    assert wide.std() == pytest.approx(0.02, rel=0.05)
    assert (wide.unique(dim=0).shape) == wide.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_torch_s(dtype):
    import torch

    values = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    values[:256].view(np.uint32)[:] = (np.arange(256, dtype=np.uint32) << 16) + 0x3F808000  # ties
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy()
    assert np.array_equal(synth_weights._rounded(values, dtype).view(np.int16), expected)


@pytest.mark.parametrize("arch", [name for name in TINY if name != "tiny-vit"])
def test_tokenizer_gives_a_token_per_byte_and_round_trips(tmp_path, arch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(synth(arch, tmp_path / "m"))
    text = " it's\n\n<b>Grüße</b>, 你好 🎉 "
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(numbers) == len(text.encode())
    assert tokenizer.decode(numbers) == text
    assert len(tokenizer) == ARCHS[arch].config["vocab_size"]
    for token, number in tokenizer_files(ARCHS[arch].config)["tokenizer.json"]["model"]["vocab"].items():
        assert tokenizer.convert_ids_to_tokens(number) == token
    if arch == "tiny-bert":
        pair = tokenizer("a", "b")
        assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
        assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
        assert tokenizer.pad_token_id == 0
    else:
        assert tokenizer(text)["input_ids"] == numbers
        assert tokenizer.eos_token_id == ARCHS[arch].config["eos_token_id"]


@pytest.mark.parametrize("arch", ["bert-large", "gpt2-medium", "gpt-j-6b", "llama-3b"])
def test_a_full_vocabulary_has_bytes_behind_every_id(arch):
    config = ARCHS[arch].config
    vocabulary = tokenizer_files(config)["tokenizer.json"]["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert all(vocabulary)


def test_vit_comes_with_its_image_processor(tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor

    directory = synth("tiny-vit", tmp_path / "m")
    assert not (directory / "tokenizer.json").exists()
    pixels = AutoImageProcessor.from_pretrained(directory)(Image.new("RGB", (50, 40)), return_tensors="np")
    assert pixels["pixel_values"].shape == (1, 3, 32, 32)


def test_sizes_are_the_published_ones():
    billions = {
        name: sum(math.prod(shape) for _, shape in arch.tensors()) / 1e9
        for name, arch in ARCHS.items()
        if name not in TINY
    }
    assert billions == pytest.approx(
        {"bert-large": 0.336, "vit-large": 0.304, "gpt2-medium": 0.355, "gpt-j-6b": 6.051, "llama-3b": 3.213}, abs=6e-4
    )


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    def contents(directory):
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    first = contents(synth("tiny-gpt2", tmp_path / "a", seed=7))
    again = contents(synth("tiny-gpt2", tmp_path / "b", seed=7))
    other = contents(synth("tiny-gpt2", tmp_path / "c", seed=8))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["config.json"] == other["config.json"]


def test_values_look_trained_and_do_not_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(synth_weights, "_CHUNK_ELEMENTS", 1 << 10)
    stored = tensors_of(synth("tiny-gpt2", tmp_path / "m"))
    wide = stored["h.1.mlp.c_fc.weight"]
    assert wide.shape == (64, 256)
    assert wide.mean() == pytest.approx(0, abs=1e-3)
    assert wide.std() == pytest.approx(0.02, rel=0.05)
    assert (stored["h.1.ln_1.weight"] == 1).all()
    assert 0 < np.abs(stored["h.1.ln_1.bias"]).max() < 0.02
    chunks = {wide.reshape(-1, 1 << 10)[i].tobytes() for i in range(16)}
    assert len(chunks) == 16
    assert not np.array_equal(wide, stored["h.2.mlp.c_fc.weight"])


def test_shards_hold_every_tensor_once_and_the_index_says_where(tmp_path, monkeypatch):
    def small_shards(tensors, dtype):
        return plan_shards(tensors, dtype, shard_bytes=200_000)

    monkeypatch.setattr(synth_module, "plan_shards", small_shards)
    split = synth("tiny-llama", tmp_path / "split")
    monkeypatch.undo()
    whole = tensors_of(synth("tiny-llama", tmp_path / "whole"))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        with safe_open(split / file, framework="np") as stored:
            for name in stored.keys():
                assert index["weight_map"][name] == file
                assert np.array_equal(stored.get_tensor(name), whole[name])


@pytest.mark.parametrize("arch", ["gpt-j-6b", "llama-3b", "gpt2-medium"])
def test_no_shard_of_a_real_size_passes_the_limit(arch):
    shards = plan_shards(ARCHS[arch].tensors(), ARCHS[arch].dtype)
    assert max(shard.weight_bytes for shard in shards) <= synth_weights.SHARD_BYTES
    assert all(len(shard.header()) % 8 == 0 for shard in shards)
    assert sorted(tensor for shard in shards for tensor in shard.tensors) == sorted(ARCHS[arch].tensors())


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    directory = synth("tiny-bert", tmp_path / "m", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors_of(directory).values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_same_request_again_writes_nothing(tmp_path):
    directory = synth("tiny-vit", tmp_path / "m")
    before = (directory / "model.safetensors").stat()
    assert synth("tiny-vit", directory, dtype="float32", seed=0) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(InputError, match=r'holds another synth .*"seed": 0'):
        synth("tiny-vit", directory, seed=1)


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "m").mkdir()
    assert (synth("tiny-vit", tmp_path / "m") / STAMP_NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "bert-huge"}, "no architecture 'bert-huge'; choose from bert-large, vit-large"),
        ({"dtype": "int3"}, "cannot write dtype 'int3'; choose from float32, bfloat16, float16"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_unknown_choices_are_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        synth(**{"arch": "tiny-bert", "directory": tmp_path / "m"} | arguments)
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_way_are_left_alone(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        synth("tiny-bert", tmp_path / "m")
    with pytest.raises(InputError, match="is a file"):
        synth("tiny-bert", tmp_path / "m" / "thesis.tex")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(synth_module.shutil, "disk_usage", lambda place: usage(1 << 40, 1 << 40, 3 << 30))
    with pytest.raises(InputError, match=r"gpt-j-6b needs 11\.3 GiB of disk, .* has 3 GiB free"):
        synth("gpt-j-6b", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    def fail(done, total):
        raise failure

    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        synth("tiny-bert", tmp_path / "m", progress=fail)
    assert not list(tmp_path.iterdir())


def test_torch_is_not_needed():
    script = "import sys, hermes.checkpoint.synth; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
@requires_cgroup
def test_a_large_model_is_made_in_little_memory(tmp_path):
    script = f"""
        from pathlib import Path
        from hermes.checkpoint.synth import synth
        from hermes.memory.probe import peak_resident_bytes
        synth("gpt2-medium", Path({str(tmp_path / "m")!r}))
        print(peak_resident_bytes())
    """
    result = run_capped([sys.executable, "-c", textwrap.dedent(script)], limit_bytes=160 << 20)
    assert result.returncode == 0, result.stderr
    # the interpreter with numpy is some 35 MiB of it
    assert int(result.stdout) < 110 << 20
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 1_400_000_000
