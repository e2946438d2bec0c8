"""How much is warmed up, and what the planner is told of it."""

import pytest

from hermes.checkpoint.pack import pack
from hermes.checkpoint.synth import synth
from hermes.memory.probe import num_cores, resident_bytes
from hermes.memory.warm import CHUNK_BYTES, Warmed
from hermes.plan import TOUCH_STEP_BYTES
from hermes.session import Workload, start_warm_up, touch_when_warm
from hermes.session.warm import LEAST_BYTES, PREPARING_BYTES


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    synth("tiny-gpt2", directory)
    return directory


MANY = Workload(sequence_length=16, max_new_tokens=8)


def asked_of(monkeypatch, *arguments):
    asked = []
    monkeypatch.setattr("hermes.session.warm.WarmUp", asked.append)
    start_warm_up(*arguments)
    return asked[0]


def test_never_more_than_the_preparations_leave(gpt2, monkeypatch):
    assert asked_of(monkeypatch, gpt2, None, LEAST_BYTES, MANY) == 0
    assert asked_of(monkeypatch, gpt2, None, resident_bytes() + PREPARING_BYTES, MANY) <= CHUNK_BYTES


def test_never_more_than_the_weights(gpt2, monkeypatch):
    weights = sum(path.stat().st_size for path in gpt2.glob("*.safetensors"))
    assert 0 < asked_of(monkeypatch, gpt2, None, 2**40, MANY) <= weights


def test_never_more_than_what_is_left_of_packed_weights(tmp_path, monkeypatch):
    synth("tiny-llama", tmp_path / "model", dtype="bfloat16")
    pack(tmp_path / "model", tmp_path / "packed")
    weights = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert 0 < asked_of(monkeypatch, tmp_path / "packed", None, 2**40, MANY) <= weights


def test_cheap_as_far_as_it_came():
    curve = touch_when_warm((7e-9,), Warmed(nbytes=2 * TOUCH_STEP_BYTES + 1, seconds_per_byte=3e-9))
    assert len(curve) == 3
    assert curve[0] == curve[1] > 0
    assert curve[2] == pytest.approx(3e-9 / num_cores())


def test_what_was_known_holds_where_it_came_nowhere():
    assert touch_when_warm([7e-9, 8e-9], Warmed(nbytes=0, seconds_per_byte=0.0)) == (7e-9, 8e-9)
