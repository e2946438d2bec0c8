"""`hermes plan`: what it prints, what it writes, and what it refuses before any work."""

import json
import subprocess
import sys

import pytest

from hermes.checkpoint.synth import synth
from hermes.cli.plan import plan, settle_workload
from hermes.errors import BudgetError, CheckpointError, InputError, ModelError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return synth("tiny-gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return synth("tiny-bert", tmp_path_factory.mktemp("models") / "tiny-bert")


def hermes(*words, cache):
    return subprocess.run(
        [sys.executable, "-m", "hermes", *map(str, words)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )


def test_a_plan_and_a_sweep_from_the_command_line(gpt2, tmp_path):
    drawn, written = tmp_path / "sweep.html", tmp_path / "plan.json"
    done = hermes("plan", gpt2, "--budget", "3GiB", "--sweep", "--plot", drawn, "--json", written, cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Plan for 3 GiB", "limited by", "Where the budget goes", "Latency against budget", "first pass"):
        assert word in done.stdout
    assert "<svg" in drawn.read_text()

    document = json.loads(written.read_text())
    assert document["weight_bytes"] > 700_000
    assert document["sequence_length"] + document["max_new_tokens"] <= 128
    one, sweep = document["plan"], document["sweep"]
    assert one["peak_bytes"] <= one["budget_bytes"] == 3 << 30
    assert one["pass_bytes"] == 0
    assert sweep[0]["budget_bytes"] == document["smallest_budget_bytes"]
    assert sweep[-1]["pass_bytes"] == 0
    assert [p["budget_bytes"] for p in sweep] == sorted(p["budget_bytes"] for p in sweep)
    assert all(p["peak_bytes"] <= p["budget_bytes"] for p in sweep)


def test_json_on_standard_output_stands_alone(bert, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan(str(bert), budget="8GiB", json_file="-", seq=32, batch=2)
    document = json.loads(capsys.readouterr().out)
    assert (document["batch_size"], document["sequence_length"], document["max_new_tokens"]) == (2, 32, 0)
    assert document["plan"]["first_pass_seconds"] == document["plan"]["total_seconds"]
    assert "sweep" not in document


def test_choices_are_kept(bert, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan(
        str(bert), budget="8GiB", json_file="-", agents=3, granularity="layer", resident_bytes="0", sequential=True,
    )  # fmt: skip
    settled = json.loads(capsys.readouterr().out)["plan"]
    assert (settled["num_agents"], settled["granularity"], settled["sequential"]) == (3, "layer", True)
    assert settled["resident_bytes"] == 0 < settled["pass_bytes"]


def test_a_budget_too_small_names_the_one_that_works(bert, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BudgetError, match=r"try --budget \d+MiB"):
        plan(str(bert), budget="1MiB")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, InputError, "--budget"),
        ({"budget": "plenty"}, BudgetError, "plenty"),
        ({"budget": "1GiB", "granularity": "atom"}, InputError, "atom"),
        ({"budget": "1GiB", "resident_bytes": "-1"}, BudgetError, "-1"),
        ({"budget": "1GiB", "plot": "a.gif"}, InputError, r"\.png or \.html"),
        ({"budget": "1GiB", "seq": 100, "new_tokens": 100}, InputError, "context of 128; try --seq 28"),
        ({"budget": "1GiB", "dtype": "float3"}, InputError, "float3"),
    ],
)
def test_what_is_refused(gpt2, options, error, message, tmp_path):
    if "plot" in options:
        options = options | {"plot": tmp_path / options["plot"]}
    with pytest.raises(error, match=message):
        plan(str(gpt2), **options)


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError, match="no such file"):
        plan("/no/such/model", budget="1GiB")


def test_a_file_that_cannot_be_written(bert, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="cannot write"):
        plan(str(bert), budget="8GiB", json_file=str(tmp_path / "no" / "plan.json"))


class TestWorkload:
    def settle(self, directory, **given):
        task, workload = settle_workload(
            directory, **{"task": None, "batch": 1, "seq": None, "new_tokens": None, **given}
        )
        return task, workload.sequence_length, workload.max_new_tokens

    def test_shapes_give_way_to_the_context(self, gpt2):
        assert self.settle(gpt2) == ("text-generation", 64, 64)
        assert self.settle(gpt2, seq=120) == ("text-generation", 120, 8)
        assert self.settle(gpt2, new_tokens=8) == ("text-generation", 120, 8)

    def test_an_encoder_generates_nothing(self, bert):
        assert self.settle(bert) == ("feature-extraction", 128, 0)

    def test_numbers_that_were_given_do_not_give_way(self, gpt2, bert):
        with pytest.raises(InputError, match=r"--seq 1 --new-tokens 127"):
            self.settle(gpt2, new_tokens=500)
        with pytest.raises(InputError, match="128"):
            self.settle(bert, seq=129)

    def test_without_a_configuration_there_is_no_workload(self, tmp_path):
        with pytest.raises(ModelError):
            self.settle(tmp_path)
