"""`hermes pack --quantize` and `hermes bench MODEL` as a user types them, each in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hermes.checkpoint.synth import synth

ENOUGH = "2GiB"


def hermes(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hermes", *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


def refusal(*arguments: str | Path) -> str:
    result = hermes(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A decoder, and an encoder, with quantised copies."""
    root = tmp_path_factory.mktemp("quantised")
    for name in ("llama", "bert"):
        synth(f"tiny-{name}", root / name)
    return root


def test_there_is_a_summary_and_an_error(root):
    made = hermes("pack", root / "llama", root / "int4", "--quantize", "int4")
    assert made.returncode == 0, made.stderr
    left = "linear layers in full precision: 6 (rows no multiple of 64 or columns of 32), 1 (vocabulary head)"
    assert f"15 matrices in int4, {left}; relative RMS error of the weights" in made.stdout
    compared = hermes("bench", root / "int4", "--against", root / "llama", "--budget", ENOUGH)
    assert compared.returncode == 0, compared.stderr
    weights, outputs = compared.stdout.splitlines()
    assert "relative RMS error of the weights" in weights
    assert "relative RMS error of the logits" in outputs
    assert "the same most likely token at" in outputs


def test_streamed_is_resident(root):
    """Through the command line, and of an encoder."""
    assert hermes("pack", root / "bert", root / "int8", "--quantize", "int8").returncode == 0
    found = []
    for how in (["--budget", ENOUGH, "--resident-bytes", "0"], ["--resident"]):
        result = hermes("run", root / "int8", *how, "--text", "A sentence.", "--json")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout)["outputs"])
    assert found[0] == found[1]


def test_refusals(root, tmp_path):
    out = tmp_path / "out"
    assert "unknown; choose from int8, int4" in refusal("pack", root / "llama", out, "--quantize", "int3")
    assert "give OUT" in refusal("pack", root / "llama", "--quantize", "int8")
    assert "is not quantised" in refusal("bench", root / "llama")
    assert "for a quantised MODEL" in refusal("bench", "--against", root / "llama")
    broken = shutil.copytree(root / "llama", tmp_path / "broken")
    (broken / "config.json").write_text("[" * 200_000)
    assert "config.json: cannot be read as JSON" in refusal("pack", broken, out, "--quantize", "int8")
    assert not out.exists()
