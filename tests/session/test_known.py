"""What `hermes profile` has left spares later runs the trace, and never stands for more than it measured."""

from dataclasses import replace

import pytest

import hermes
from hermes.api import KNOWN_CODE_BYTES, pose_problem
from hermes.checkpoint.synth import synth
from hermes.profile import profile_path, save_profile
from hermes.session import Workload, prepare_model
from hermes.session.known import trace_at


class Traced(Exception):
    """A trace was made."""


def refuse(*_):
    raise Traced


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return synth("tiny-gpt2", tmp_path_factory.mktemp("known") / "gpt2")


@pytest.fixture
def profiled(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = hermes.profile(model, workload=Workload(batch_size=2, sequence_length=16, max_new_tokens=2))
    save_profile(found, profile_path(model, found.model_class, found.dtype))
    return found


@pytest.mark.parametrize(
    "workload",
    [
        Workload(batch_size=1, sequence_length=8, max_new_tokens=4),
        Workload(batch_size=2, sequence_length=20, max_new_tokens=4),
    ],
    ids=["smaller", "a little longer"],
)
def test_a_workload_like_the_profiled_one_needs_no_trace(model, profiled, monkeypatch, workload):
    fresh = prepare_model(model, workload=workload, fresh=True)
    monkeypatch.setattr("hermes.session.prepare.trace_apart", refuse)
    known = prepare_model(model, workload=workload)
    assert known.known is not None
    assert known.partition.units == fresh.partition.units
    assert known.trace is not None
    assert fresh.trace is not None
    assert known.trace.uses == fresh.trace.uses
    assert known.trace.cache_bytes == fresh.trace.cache_bytes
    assert known.trace.peak_bytes >= fresh.trace.peak_bytes


@pytest.mark.parametrize(
    "workload",
    [
        Workload(batch_size=3, sequence_length=16, max_new_tokens=4),
        Workload(batch_size=1, sequence_length=21, max_new_tokens=4),
        Workload(batch_size=1, sequence_length=8),
    ],
    ids=["batch", "sequence", "without a cache"],
)
def test_a_workload_beyond_the_profile_is_traced(model, profiled, monkeypatch, workload):
    assert trace_at(profiled, workload) is None
    monkeypatch.setattr("hermes.session.prepare.trace_apart", refuse)
    with pytest.raises(Traced):
        prepare_model(model, workload=workload)


def test_no_profile_no_trace():
    assert trace_at(None, Workload()) is None


def test_code_that_the_floor_holds_already_is_no_heap_of_the_plan(model, profiled):
    """And of nothing else: a fleet, which does not fetch it, asks for the heap as it always was."""
    assert profiled.code
    heaps = []
    for code in (profiled.code, {}):
        save_profile(replace(profiled, code=code), profile_path(model, profiled.model_class, profiled.dtype))
        known = prepare_model(model, workload=Workload(sequence_length=16, max_new_tokens=2))
        with known.reader() as reader:
            heaps.append((known.heap_bytes, pose_problem(known, reader)[0].heap_bytes))
    (own, planned), (own_without, planned_without) = heaps
    assert own == own_without == planned_without == planned + KNOWN_CODE_BYTES
