"""`hermes synth`: the directory, and what stands in its way."""

import sys

import pytest

from hermes.cli.synth import synth
from hermes.errors import InputError


def test_a_checkpoint_is_made(tmp_path, capsys):
    synth("tiny-llama", tmp_path / "model", dtype="bfloat16", seed=3)
    assert (tmp_path / "model" / "model.safetensors").exists()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "tiny-llama" in line
    assert "KiB of weights" in line


def test_progress_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    synth("tiny-bert", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [("gpt-9", {}, "gpt2-medium"), ("tiny-bert", {"dtype": "int3"}, "int3"), ("tiny-bert", {"seed": -1}, "seed")],
)
def test_what_is_refused(tmp_path, arch, options, message):
    with pytest.raises(InputError, match=message):
        synth(arch, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
