"""`hermes profile`: measures, stores where the planner looks, and shows."""

import json

import pytest

from hermes.checkpoint.synth import synth
from hermes.cli.plan import plan
from hermes.cli.profile import profile
from hermes.errors import InputError
from hermes.profile import profile_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return synth("tiny-gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_profile_is_shown_stored_and_used(model, capsys, tmp_path):
    profile(str(model), seq=16, json_file=str(tmp_path / "copy.json"))
    shown = capsys.readouterr().out
    for word in ("3 x transformer.h.*", "lm_head", "by 1", "by 4", "Disk, past the page cache", "floor"):
        assert word in shown
    stored = profile_path(model, "GPT2LMHeadModel", "float32")
    record = json.loads(stored.read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == record
    assert record["measured"]
    assert all(unit["nbytes"] > 0 and unit["load_seconds"] for unit in record["units"])

    plan(str(model), budget="8GiB", json_file="-")
    assert json.loads(capsys.readouterr().out)["measured"]


def test_json_on_standard_output_stands_alone(model, capsys):
    profile(str(model), seq=16, new_tokens=0, json_file="-")
    assert json.loads(capsys.readouterr().out)["sequence_length"] == 16


def test_a_length_the_model_has_no_positions_for(model, cache):
    with pytest.raises(InputError, match="context of 128"):
        profile(str(model), seq=1000)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(model, cache):
    cache.write_text("a file in the way")
    with pytest.raises(InputError, match="cannot write"):
        profile(str(model), seq=16, new_tokens=0)
