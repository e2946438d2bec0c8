"""Quantised directories: values by the rule, everything else bit for bit, whole or not at all, broken ones named."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hermes.checkpoint import open_checkpoint, quantize
from hermes.checkpoint.pack import pack
from hermes.checkpoint.quantize import quantize_rows
from hermes.checkpoint.quantized import GROUP, in_full
from hermes.errors import CheckpointError, InputError
from hermes.model.quantized import QuantizedMatrix

MATRICES = ("a.weight", "b.weight", "c.weight")


@pytest.fixture
def model(tmp_path):
    """Matrices of each dtype, one with a row and a group of zeros, and what stays as it is."""
    source = tmp_path / "model"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.arange(7, dtype=torch.int8),
        "a.weight": (torch.randn(128, 192, generator=generator) / 50).bfloat16(),
        "a.bias": torch.randn(128, generator=generator).bfloat16(),
        "b.weight": torch.randn(64, 64, generator=generator) * 1e-4,
        "c.weight": (torch.randn(64, 128, generator=generator) / 1000).half(),
        "plain.weight": torch.randn(65, 30, generator=generator),
        "no_rows.weight": torch.zeros(0, 64),
    }
    tensors["a.weight"][3] = 0
    tensors["a.weight"][5, :GROUP] = 0.25
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text('{"model_type": "llama"}')
    return source


def floats(directory):
    """Every quantised matrix as float32."""
    checkpoint = open_checkpoint(directory)
    stored = {}
    for stamp in checkpoint.files:
        with safe_open(stamp.path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}

    def content(entry):
        return stored[entry.name].reshape(-1).view(torch.uint8)

    return {
        name: QuantizedMatrix(matrix, content(matrix.values), content(matrix.scales)).floats()
        for name, matrix in checkpoint.quantized.items()
    }


@pytest.mark.parametrize(("scheme", "error"), [("int8", 0.009), ("int4", 0.1)])
def test_what_is_written(model, tmp_path, scheme, error):
    told = []
    out = tmp_path / "out"
    quantize.quantize(model, out, scheme, MATRICES, progress=lambda done, total: told.append((done, total)))
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in before.values())
    assert after.keys() == before.keys() | {f"{name}.scales" for name in MATRICES}
    for name in before.keys() - set(MATRICES):
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    checkpoint = open_checkpoint(out)
    assert {name: entry.shape for name, entry in in_full(checkpoint).items()} == {
        name: tuple(tensor.shape) for name, tensor in before.items()
    }
    made = floats(out)
    for name in MATRICES:
        lost, there = checkpoint.quantized[name].errors
        found = float((made[name] - before[name].float()).norm() / before[name].float().norm())
        assert found == pytest.approx((lost / there) ** 0.5, rel=1e-4)
        assert found < error
    assert not made["a.weight"][3].any()
    assert (made["a.weight"][5, :GROUP] - 0.25).abs().max() < 0.001
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hermes"
    assert config["model_type"] == "llama"
    again = (out / "model.safetensors").stat()
    quantize.quantize(model, out, scheme, MATRICES)
    assert (out / "model.safetensors").stat() == again


def test_values_by_the_rule():
    """Written out for one row: what docs/format.md says."""
    weights = np.linspace(-1, 2, GROUP, dtype=np.float32)[None].repeat(64, axis=0)
    values, scales, *_ = quantize_rows(weights, 8)
    assert values[0].tolist() == np.rint(weights[0] / np.float32(2 / 127)).tolist()
    assert scales[0] == np.float32(2) / np.float32(127)
    weights[32] *= -1
    values, scales, *_ = quantize_rows(weights, 4)
    assert (values & 15)[0, :, 0].tolist() == np.rint(np.linspace(0, 15, GROUP)).tolist()
    assert (values >> 4)[0, :, 0].tolist() == np.rint(np.linspace(15, 0, GROUP)).tolist()
    assert scales[0, 0].tolist() == pytest.approx([0.2, 0.6])


def test_from_packed(model, tmp_path):
    pack(model, tmp_path / "packed")
    quantize.quantize(model, tmp_path / "a", "int4", MATRICES)
    quantize.quantize(tmp_path / "packed", tmp_path / "b", "int4", MATRICES)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_goes_on_behind_the_last_whole_file(model, tmp_path, monkeypatch):
    quantize.quantize(model, tmp_path / "whole", "int8", MATRICES)
    monkeypatch.setattr(quantize, "SHARD_BYTES", 20_000)
    out, write = tmp_path / "out", quantize._write_quantized

    def killed(out, part, *rest):
        if part.entry.name == "c.weight":
            raise KeyboardInterrupt
        return write(out, part, *rest)

    monkeypatch.setattr(quantize, "_write_quantized", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(model, out, "int8", MATRICES)
    assert not out.exists()
    written = []

    def counted(out, part, *rest):
        written.append(part.entry.name)
        return write(out, part, *rest)

    monkeypatch.setattr(quantize, "_write_quantized", counted)
    quantize.quantize(model, out, "int8", MATRICES)
    assert written == ["c.weight"]
    assert len(open_checkpoint(out).files) > 1
    for name, made in floats(tmp_path / "whole").items():
        assert torch.equal(floats(out)[name], made)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_values_that_are_not_finite(model, tmp_path, value):
    tensors = load_file(model / "model.safetensors")
    tensors["b.weight"][0, 0] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match=r"b\.weight.*not finite"):
        quantize.quantize(model, tmp_path / "out", "int4", MATRICES)
    assert not (tmp_path / "out").exists()


def test_refused(model, tmp_path):
    quantize.quantize(model, tmp_path / "out", "int8", MATRICES)
    with pytest.raises(InputError, match="quantised already"):
        quantize.quantize(tmp_path / "out", tmp_path / "again", "int4", MATRICES)
    with pytest.raises(InputError, match="is quantised"):
        pack(tmp_path / "out", tmp_path / "packed")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "a.weight.scales": torch.ones(3)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="rename"):
        quantize.quantize(model, tmp_path / "named", "int8", MATRICES)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w": torch.zeros(1, 64, 64, dtype=torch.int8), "w.scales": torch.ones(63)}, "no quantised matrix"),
        ({"w": torch.zeros(1, 63, 64, dtype=torch.int8), "w.scales": torch.ones(63)}, "no quantised matrix"),
        ({"w": torch.zeros(64, dtype=torch.int8), "w.scales": torch.ones(64)}, "no quantised matrix"),
        ({"w": torch.zeros(1, 64, 64, dtype=torch.int8), "w.scales": torch.ones(64).double()}, "no quantised matrix"),
        ({"w": torch.zeros(64, 64, dtype=torch.int8), "w.scales": torch.ones(64)}, "no quantised matrix"),
        ({"w": torch.tensor(1, dtype=torch.int8), "w.scales": torch.ones(64)}, "no quantised matrix"),
        ({"w": torch.zeros(1, 64, 32, dtype=torch.uint8), "w.scales": torch.ones(2, 64)}, "no quantised matrix"),
        ({"w": torch.zeros(0, 64, 32, dtype=torch.uint8), "w.scales": torch.ones(1, 0, 2)}, "no quantised matrix"),
    ],
)
def test_parts_that_do_not_fit(change, match, tmp_path):
    save_file(change, tmp_path / "model.safetensors", metadata={"format": "hermes-quant-1", "errors": "[["})
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path)


def test_a_later_format(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "hermes-quant-2"})
    with pytest.raises(CheckpointError, match="hermes-quant-2"):
        open_checkpoint(tmp_path)
