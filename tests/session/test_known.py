"""What `hermes profile` has left spares later runs the trace, and never stands for more than it measured."""

import pytest

import hermes
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
