import json

import pytest

from hermes.engine import EngineStats, Span
from hermes.report.trace import chrome_trace, write_trace


@pytest.fixture
def stats():
    return EngineStats(
        spans=[
            Span("loader-1", "h.0.weight", 10.0, 10.5, 4096),
            Span("inference", "block 0", 10.5, 10.75),
            Span("loader-0", "h.1.weight", 10.1, 10.2, 512),
        ],
        memory=[(10.25, 1 << 20)],
    )


def test_a_track_for_each_agent_and_memory_as_a_counter(stats):
    events = chrome_trace(stats)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {1: "inference", 2: "loader-0", 3: "loader-1"}
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["h.0.weight"]["ts"] == 0
    assert spans["h.0.weight"]["dur"] == pytest.approx(500_000)
    assert spans["h.0.weight"]["args"] == {"bytes": 4096}
    assert names[spans["block 0"]["tid"]] == "inference"
    (counter,) = [event for event in events if event["ph"] == "C"]
    assert counter["ts"] == pytest.approx(250_000)
    assert counter["args"] == {"bytes": 1 << 20}


def test_written_whole(stats, tmp_path):
    write_trace(stats, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == chrome_trace(stats)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_nothing_recorded():
    assert [event["ph"] for event in chrome_trace(EngineStats())["traceEvents"]] == ["M"]


def test_a_failed_write_leaves_nothing(stats, tmp_path):
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(OSError, match=r"trace\.json"):
        write_trace(stats, tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
