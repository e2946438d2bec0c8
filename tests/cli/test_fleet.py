"""`hermes fleet run`: the file, the table, the refusals."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from hermes.cli.app import app
from hermes.cli.fleet_file import read_fleet_file
from hermes.errors import HermesError
from hermes.memory.probe import resident_bytes

NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
"""
FLEET = """
policy = "deadline"

[models.one]
module = "net.py:net"
weights = "net.safetensors"
shape = [1, 256]
requests = 3
importance = 2

[models.two]
module = "net.py:net"
weights = "net.safetensors"
inputs = "inputs.safetensors"
requests = 4
rate = 50.0
deadline = 5.0
"""


@pytest.fixture
def directory(tmp_path):
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    save_file({"a": torch.zeros(1, 256), "b": torch.ones(1, 256)}, tmp_path / "inputs.safetensors")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(app, ["fleet", "run", *map(str, words)])


def test_it_runs_what_the_file_asks(directory):
    budget = f"{(resident_bytes() >> 20) + 200}MiB"
    done = invoke(directory / "fleet.toml", "--budget", budget, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {name: model["requests"] for name, model in report["models"].items()} == {"one": 3, "two": 4}
    assert report["policy"] == "deadline"
    assert all(model["failed"] == 0 for model in report["models"].values())
    table = invoke(directory / "fleet.toml", "--budget", budget, "--policy", "round-robin")
    assert table.exit_code == 0, table.output
    assert "one" in table.stdout
    assert "policy  round-robin" in table.stdout


def test_without_a_budget_or_with_too_little(directory):
    done = invoke(directory / "fleet.toml")
    assert done.exit_code == 2
    assert "--budget" in done.stderr
    done = invoke(directory / "fleet.toml", "--budget", "30MiB")
    assert done.exit_code == 2
    assert "try --budget" in done.stderr


def test_what_it_does_is_said_beside_the_report(directory):
    done = invoke(directory / "fleet.toml", "--budget", f"{(resident_bytes() >> 20) + 200}MiB", "--json")
    assert done.stderr.splitlines() == [
        "measuring one (1 of 2) ...", "measuring two (2 of 2) ...", "2 models start ...", "7 requests ..."
    ]  # fmt: skip
    json.loads(done.stdout)


def test_an_input_that_the_module_cannot_take(directory):
    file = directory / "fleet.toml"
    file.write_text(file.read_text().replace("[1, 256]", "[1, 5]"))
    done = invoke(file, "--budget", f"{(resident_bytes() >> 20) + 200}MiB")
    assert done.exit_code == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {file}: one: ")
    assert "cannot take an input of shape [1, 5]: RuntimeError: " in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = [", "not TOML"),
        ("", "no models"),
        ("colour = 1\n[models.a]\nmodel = 'x'", "unknown key colour"),
        ("budget = 'much'\n[models.a]\nmodel = 'x'", "cannot read 'much'"),
        ("[models.a]", "model ="),
        ("[models.a]\nmodel = 'x'\nweights = 'y'", "go with a module"),
        ("[models.a]\nmodule = 'x.py:f'\nweights = 'y'", "shape"),
        ("[models.a]\nmodule = 'x.py'\nweights = 'y'\nshape = [1]", r"FILE\.py:NAME"),
        ("[models.a]\nmodule = 'x.py:f'\nweights = 'y'\nshape = [0]", "above 0"),
        ("[models.a]\nmodel = 'x'\nrate = 0", "must be above 0"),
        ("[models.a]\nmodel = 'x'\nrequests = 1.5", "is no int"),
        ("[models.a]\nmodel = 'x'\nspeed = 1", "unknown key speed"),
    ],
)
def test_what_is_wrong_with_the_file(tmp_path, text, message):
    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(HermesError, match=message):
        read_fleet_file(tmp_path / "fleet.toml")
