"""How much memory is found beside the preparations, and what the planner is told of it."""

import time
from types import SimpleNamespace

import pytest

from hermes.checkpoint import open_checkpoint
from hermes.checkpoint.pack import pack
from hermes.checkpoint.synth import synth
from hermes.memory.arena import Arena
from hermes.memory.probe import num_cores, resident_bytes
from hermes.memory.warm import CHUNK_BYTES, Warmed
from hermes.plan import TOUCH_STEP_BYTES
from hermes.session import Workload, touch_when_warm
from hermes.session.beside import FIRST_IMPORT_BYTES, IMPORTING_BYTES, Beside

MANY = Workload(sequence_length=16, max_new_tokens=8)


VAST = SimpleNamespace(nbytes=2**40, files=[SimpleNamespace(nbytes=2**40)])
"""A checkpoint, as far as memory is found for it."""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    synth("tiny-gpt2", directory)
    return open_checkpoint(directory)


class Counted:
    """A warm-up that takes at once what it may."""

    def __init__(self, nbytes, range_bytes):
        assert nbytes <= range_bytes
        self.nbytes = nbytes

    def stop(self):
        return Warmed(Arena(0), self.nbytes, 1e-9)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr("hermes.session.beside.WarmUp", Counted)


def warmed(checkpoint, limit_bytes):
    with Beside(checkpoint, limit_bytes, MANY, None) as beside:
        return beside.stop().nbytes


def test_never_more_than_the_preparations_leave(counted):
    assert warmed(VAST, 0) == 0
    assert warmed(VAST, resident_bytes() + IMPORTING_BYTES) <= CHUNK_BYTES
    assert warmed(VAST, resident_bytes() + 2**30) <= 2**30


def test_never_more_than_the_weights(gpt2, counted):
    weights = sum(file.nbytes for file in gpt2.files)
    assert 0 < warmed(gpt2, 2**40) <= weights


def test_tracing_is_made_room_for():
    with Beside(VAST, resident_bytes() + FIRST_IMPORT_BYTES + 4 * CHUNK_BYTES, MANY, None) as beside:
        while not beside.held_bytes:
            time.sleep(0.005)
        beside.tracing()
        assert beside.held_bytes == 0


def test_never_more_than_what_is_left_of_packed_weights(tmp_path, counted):
    synth("tiny-llama", tmp_path / "model", dtype="bfloat16")
    pack(tmp_path / "model", tmp_path / "packed")
    packed = open_checkpoint(tmp_path / "packed")
    assert 0 < warmed(packed, 2**40) <= sum(file.nbytes for file in packed.files)


def test_a_profile_has_the_code_fetched(gpt2, monkeypatch):
    fetched = []
    monkeypatch.setattr("hermes.session.beside.fetch_code", fetched.append)
    code = {"library": [(0, 4096)]}
    with Beside(gpt2, 2**40, MANY, SimpleNamespace(preparing_code=code)):
        assert fetched == [code]


def test_nothing_to_find_as_far_as_it_came():
    curve = touch_when_warm((7e-9,), Warmed(Arena(0), 2 * TOUCH_STEP_BYTES + 1, 3e-9))
    assert len(curve) == 3
    assert curve[0] == curve[1] == 0
    assert curve[2] == pytest.approx(3e-9 / num_cores())


def test_what_was_known_holds_where_it_came_nowhere():
    assert touch_when_warm([7e-9, 8e-9], Warmed(Arena(0), 0, 0.0)) == (7e-9, 8e-9)
